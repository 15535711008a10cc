"""Simulates the router on a virtual clock, with seeded nodes, loads and requests, and with policies to compare it
with."""
