"""vLLM's entry point: called once in every vLLM process, before it parses its arguments."""


def register() -> None:
    """Register the load format ``sllm``; called through the entry-point group ``vllm.general_plugins``."""
    import sllm_vllm.loader.vllm_loader  # noqa: F401 (imports vLLM: not before vLLM asks for us)
