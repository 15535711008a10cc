"""vLLM's entry point: called once in every vLLM process, before it parses its arguments."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType

import wrapt

from sllm_vllm.start_hint import StartHint, plan_hint

_OURS = "sllm"
_MODEL_LOADERS = "vllm.model_executor.model_loader"


def register() -> None:
    """Have the load format ``sllm`` registered; called through the entry points ``vllm.general_plugins``.

    Registering needs vLLM's loaders imported, which takes 0.6 s, and only the workers use them. So this waits until
    somebody imports them: a process that never does starts that much faster.
    """
    wrapt.register_post_import_hook(_register_now, _MODEL_LOADERS)
    _keep_quiet_about_ours()
    _hook_if_wanted()
    _hint_once()


def _register_now(module: ModuleType) -> None:
    """Import our loader, whose class registers itself with ``module``."""
    import sllm_vllm.loader.vllm_loader  # noqa: F401 (not before vLLM's own loaders are there)


class _WithoutOurs(logging.Filter):
    """Takes our endpoint plugin out of vLLM's advice to allow endpoint plugins by ``VLLM_PLUGINS``.

    Its routes are for the router's moves alone, and it sets the variable for the engines that need them; a user who
    follows the advice has every engine start cold. Plugins of others are still named, and all other records pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Found endpoint plugin(s)") or not isinstance(record.args, tuple):
            return True
        names = record.args[0] if record.args else None
        if not isinstance(names, list) or _OURS not in names:
            return True
        others = [name for name in names if name != _OURS]
        record.args = (others, *record.args[1:])
        return bool(others)


def _keep_quiet_about_ours() -> None:
    logger = logging.getLogger("vllm.plugins")
    if not any(isinstance(one, _WithoutOurs) for one in logger.filters):
        logger.addFilter(_WithoutOurs())


def _hook_if_wanted() -> None:
    """Let requests be moved from and to this engine; a server that nobody moves requests of stays stock vLLM."""
    from sllm_vllm.config import is_migration_wanted  # vLLM has imported pydantic by now

    if is_migration_wanted():
        from sllm_vllm.engine.install import register_hooks

        register_hooks()


def _hint_once() -> None:
    """Tell the store's daemon what this start will want, many seconds before a worker asks for it.

    Engine core and workers are children of ``multiprocessing``, which hands them the first process's argv; the process
    that inspects a model's class is none, but has an argv of its own, without a load format.
    """
    if multiprocessing.parent_process() is None and (hint := plan_hint(sys.argv)) is not None:
        _send(hint)


def _send(hint: StartHint) -> None:
    from sllm_vllm.config import default_store_dir, default_store_socket  # vLLM has imported pydantic by now
    from sllm_vllm.store.channel import send_hint

    try:
        store_dir = Path(hint.store_dir) if hint.store_dir is not None else default_store_dir()
        send_hint(default_store_socket(store_dir), hint.model, hint.tensor_parallel_size)
    except (RuntimeError, ValueError):  # a home or a path that isn't there: the loader will say so
        return
