"""The format as pure functions and frozen records: no I/O, no clock, no torch."""
