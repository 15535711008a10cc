"""The router on a virtual clock: a seeded simulation of nodes, loads and requests, and policies to compare it with."""
