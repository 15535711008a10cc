"""Loads checkpoints into a model's parameters, and writes them. Runs in every vLLM worker.

Of the modules that run there, only those named ``vllm_*`` import vLLM; the others need torch alone.
"""
