"""Context lengths of models, asked of an engine once it is ready. Runs on the controller's loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sllm_vllm.router.engine_client.api import EngineApi
from sllm_vllm.router.engine_client.connection import EngineFailed, Upstream
from sllm_vllm.router.gate import Ticket

logger = logging.getLogger(__name__)


class ModelLengths:
    """Context lengths by model, as engines reported them; forgotten when the model is changed.

    Args:
        changed: called with the model's name when its length has become known.
    """

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._known: dict[str, int] = {}
        self._upstream = Upstream()
        self._api = EngineApi(self._upstream)
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, model: str) -> int | None:
        """A model's context length in tokens; None until an engine has reported it."""
        return self._known.get(model)

    def forget(self, model: str) -> None:
        """Forget a model's length: its engines may be different from now on."""
        self._known.pop(model, None)

    def ask(self, replica: str, model: str, *, url: str, api_key: str) -> None:
        """Ask a replica that has become ready, unless its model's length is known."""
        if model in self._known or not url:
            return
        ticket = Ticket("", replica, model, url=url, api_key=api_key, attempt=1)
        task = asyncio.get_running_loop().create_task(self._ask(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all requests to engines."""
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
