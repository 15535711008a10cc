"""A node's checkpoints in host memory: one daemon, its clients, and the tiers behind it. See DESIGN.md."""
