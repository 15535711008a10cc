"""vLLM's entry point: called once in every vLLM process, before it parses its arguments."""


def register() -> None:
    """Register the load format ``sllm``. Called through the entry-point group ``vllm.general_plugins``."""
    from vllm.model_executor.model_loader import register_model_loader  # not before vLLM asks for us

    from sllm_vllm.loader.vllm_loader import SllmModelLoader

    register_model_loader("sllm")(SllmModelLoader)
