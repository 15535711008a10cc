"""Conversion between checkpoints of this package and the formats of others, outside of serving."""
