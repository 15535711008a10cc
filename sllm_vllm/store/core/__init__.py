"""What the store decides. Pure."""
