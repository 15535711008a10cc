"""What the agent decides. Pure."""
