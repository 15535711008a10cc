"""One agent a node: its accelerators, its engines, and the warm parent they are forked from. See DESIGN.md."""
