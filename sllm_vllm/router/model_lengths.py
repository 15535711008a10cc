"""How long models' contexts are: an engine is asked once it is ready. Lives on the controller's loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sllm_vllm.router.engine_api import EngineApi
from sllm_vllm.router.gate import Ticket
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.router.upstream import EngineFailed, Upstream

logger = logging.getLogger(__name__)


class ModelLengths:
    """By model, as its engines said; forgotten when the model is changed.

    Args:
        changed: called with the model after each change.
    """

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._known: dict[str, int] = {}
        self._upstream = Upstream(IngressSettings())
        self._api = EngineApi(self._upstream)
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, model: str) -> int | None:
        """Tokens; None as long as no engine has said it."""
        return self._known.get(model)

    def forget(self, model: str) -> None:
        """It may have other engines from now on."""
        self._known.pop(model, None)

    def ask(self, replica: str, model: str, *, url: str, api_key: str) -> None:
        """A replica is ready."""
        if model in self._known or not url:
            return
        ticket = Ticket("", replica, model, url=url, api_key=api_key, attempt=1)
        task = asyncio.get_running_loop().create_task(self._ask(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ask no more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._upstream.close()

    async def _ask(self, ticket: Ticket) -> None:
        try:
            length = await self._api.max_model_len(ticket)
        except EngineFailed as problem:
            logger.info("event=model_length_unknown replica=%s reason=%r", ticket.replica, str(problem))
            return
        if length is not None:
            self._known[ticket.model] = length
            self._changed(ticket.model)
