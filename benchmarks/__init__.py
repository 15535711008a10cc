"""Benchmarks, one package for each part of the project; ``results/`` has what was measured, and with which command."""
