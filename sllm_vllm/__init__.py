"""sllm-vllm makes stock vLLM serverless: weights that load fast, and many models on few GPUs.

Importing this package imports neither torch nor vLLM nor Ray; import what you need from its modules.
"""

__version__ = "0.1.0"
