"""Checkpoints on disk: the format (FORMAT.md), reading, writing and verifying. A library, used by every process."""
