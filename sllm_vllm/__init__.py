"""sllm-vllm makes stock vLLM serverless: fast weights now, many models on few GPUs as the goal.

Importing this package loads neither torch nor vLLM nor Ray; take what you need from its modules.
"""

__version__ = "0.1.0"
