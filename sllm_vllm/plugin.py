"""The plugin that vLLM calls once in each of its processes, before it parses its arguments."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType

import wrapt

from sllm_vllm.store.start_hint import StartHint, plan_hint

_OURS = "sllm"
_MODEL_LOADERS = "vllm.model_executor.model_loader"


def register() -> None:
    """Arrange for the load format ``sllm`` to be registered; vLLM's entry point in ``vllm.general_plugins``.

    Registering needs vLLM's loaders, whose import takes 0.6 s, and only the workers use them. So the format is
    registered when vLLM itself imports them: a process that never does starts that much faster.
    """
    wrapt.register_post_import_hook(_register_now, _MODEL_LOADERS)
    _keep_quiet_about_ours()
    _hook_if_wanted()
    _hint_once()


def _register_now(module: ModuleType) -> None:
    """Import our loader; its class registers itself with ``module``, vLLM's package of loaders."""
    import sllm_vllm.loader.vllm.loader  # noqa: F401 (imported only for its side effect, once vLLM's loaders are)


class _WithoutOurs(logging.Filter):
    """Removes our endpoint plugin from the log line in which vLLM advises to allow plugins by ``VLLM_PLUGINS``.

    Only the router needs the plugin's routes, for migrations, and the variable is set for the engines that need them.
    If a user followed the advice, every engine would start cold. Other endpoint plugins are still named, and all
    other log records pass unchanged.
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
    """Hook vLLM so that requests can be moved from and to this engine, if migration is on; else vLLM stays stock."""
    from sllm_vllm.config import is_migration_wanted  # vLLM has imported pydantic by now

    if is_migration_wanted():
        from sllm_vllm.engine.install import register_hooks

        register_hooks()


def _hint_once() -> None:
    """Tell the store's daemon which model this start will load, many seconds before a worker asks for it.

    Only the first process of a start sends the hint. Engine core and workers have the same argv, but are children
    started by ``multiprocessing``. vLLM's process that inspects a model's class is not, but its own argv has no load
    format, so it sends no hint either.
    """
    if multiprocessing.parent_process() is None and (hint := plan_hint(sys.argv)) is not None:
        _send(hint)


def _send(hint: StartHint) -> None:
    from sllm_vllm.config import default_store_dir, default_store_socket  # vLLM has imported pydantic by now
    from sllm_vllm.store.channel import send_hint

    try:
        store_dir = Path(hint.store_dir) if hint.store_dir is not None else default_store_dir()
        send_hint(default_store_socket(store_dir), hint.model, hint.tensor_parallel_size)
    except (RuntimeError, ValueError):  # no home directory, or an impossible path: the loader will report it
        return
