"""Keeps a node's checkpoints in host memory: one daemon, its clients, and disk and remotes behind it. See DESIGN.md."""
