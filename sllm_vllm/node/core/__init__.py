"""The agent's decisions. Pure."""
