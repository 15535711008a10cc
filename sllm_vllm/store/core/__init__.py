"""The store's decisions as pure code: no I/O, no clock, no threads."""
