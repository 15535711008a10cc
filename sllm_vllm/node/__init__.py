"""The node agent: one on each node, with its accelerators, its engines, and the warm parent they are forked from. See
DESIGN.md."""
