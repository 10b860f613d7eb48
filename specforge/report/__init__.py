"""What training and benchmark wrote, read back and drawn as one page."""
