"""vLLM's entry point: called once in every vLLM process, before it parses its arguments."""

from __future__ import annotations

from types import ModuleType

import wrapt

_MODEL_LOADERS = "vllm.model_executor.model_loader"


def register() -> None:
    """Have the load format ``sllm`` registered; called through the entry points ``vllm.general_plugins``.

    Registering needs vLLM's loaders imported, which takes 0.6 s. Only the workers use them, so this waits until
    somebody imports them: the API server and the engine core of a stock start never do, and start that much faster.
    """
    wrapt.register_post_import_hook(_register_now, _MODEL_LOADERS)


def _register_now(module: ModuleType) -> None:
    """Import our loader, whose class registers itself with ``module``."""
    import sllm_vllm.loader.vllm_loader  # noqa: F401 (not before vLLM's own loaders are there)
