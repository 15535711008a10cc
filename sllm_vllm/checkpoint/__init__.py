"""What is on disk: the format (FORMAT.md), reading, writing, verifying. A library: it runs in every process."""
