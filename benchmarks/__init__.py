"""Benchmarks: each package measures one part of the project; `results/` has what was measured, and with which command."""
