"""From files of conversations to exact tokens and loss masks."""
