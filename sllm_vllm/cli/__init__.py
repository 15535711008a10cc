"""The command line, `sllm-vllm`: one module for each group of commands."""
