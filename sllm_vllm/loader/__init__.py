"""What goes from a checkpoint into a model's parameters. Runs in every vLLM worker.

Only the modules named ``vllm_*`` import vLLM; the rest needs torch alone.
"""
