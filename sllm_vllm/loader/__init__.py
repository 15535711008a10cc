"""Loads checkpoints into a model's parameters, and writes them. Runs in every vLLM worker.

Only ``loader/vllm/`` imports vLLM; the other modules need torch alone.
"""
