"""Decisions of the loader: pure functions of frozen records."""
