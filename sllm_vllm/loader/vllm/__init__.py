"""The part of the loader that runs inside vLLM, the only one that imports it."""
