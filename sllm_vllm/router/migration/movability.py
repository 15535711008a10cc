"""Finds out whether engines can hand over and take over requests: asks each once it is ready, and informs the core.

An engine tests this at its start, when it is idle, so the answer takes a while. Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sllm_vllm.router.core.events import Event, ReplicaMovable
from sllm_vllm.router.engine_client.api import EngineApi
from sllm_vllm.router.engine_client.connection import EngineFailed, Upstream
from sllm_vllm.router.gate import Ticket

logger = logging.getLogger(__name__)

ASK_S = 0.5
ASK_S_MAX = 2.0
"""Pauses between questions grow from ``ASK_S`` to ``ASK_S_MAX``."""
TRIAL_S_MAX = 180.0
"""An engine whose test takes longer counts as one that can't."""


class Movability:
    """Asks engines, and reports their answers.

    Args:
        tell: called with a ``ReplicaMovable`` for each replica.
    """

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._upstream = Upstream()
        self._api = EngineApi(self._upstream)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def ask(self, replica: str, model: str, *, url: str, api_key: str) -> None:
        """Begin to ask a replica that has become ready."""
        ticket = Ticket("", replica, model, url=url, api_key=api_key, attempt=1)
        task = self._tasks[replica] = asyncio.get_running_loop().create_task(self._ask(ticket))
        task.add_done_callback(lambda _: self._tasks.pop(replica, None))

    def forget(self, replica: str) -> None:
        """Stop asking a replica that has ended."""
        if (task := self._tasks.get(replica)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop asking all replicas."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._upstream.close()

    async def _ask(self, ticket: Ticket) -> None:
        reason = f"it has not tried it out after {TRIAL_S_MAX:g} s"
        try:
            async with asyncio.timeout(TRIAL_S_MAX):
                reason = await self._answer(ticket)
        except TimeoutError:
            pass
        except EngineFailed as problem:
            reason = str(problem)
        if reason:
            logger.info("event=replica_not_movable replica=%s reason=%r", ticket.replica, reason)
        self._tell(ReplicaMovable(ticket.replica, is_movable=not reason, reason=reason))

    async def _answer(self, ticket: Ticket) -> str:
        """Why the engine can't move requests; empty if it can."""
        pause_s = ASK_S
        while True:
            reply = await self._api.state(ticket)
            if reply.status != 200:
                return f"its engine has no such route: it answers {reply.status}"
            if (can := reply.body.get("resume")) is not None:
                return "" if can else str(reply.body.get("reason") or "its engine says so")
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, ASK_S_MAX)
