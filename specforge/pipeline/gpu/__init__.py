"""`specforge doctor --gpu`: what a GPU is checked for, each check against a slow reference."""
