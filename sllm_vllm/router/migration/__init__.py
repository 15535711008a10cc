"""Migration of running requests between engines: tokens move, and the target recomputes the KV cache."""
