"""Whether engines can hand over and take over requests: asked of each once it is ready, told to the core.

An engine tries it out at its start, in a quiet moment, so the answer takes a while. Lives on the controller's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sllm_vllm.router.core.events import Event, ReplicaMovable
from sllm_vllm.router.engine_api import EngineApi
from sllm_vllm.router.gate import Ticket
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.router.upstream import EngineFailed, Upstream

logger = logging.getLogger(__name__)

ASK_S = 0.5
ASK_S_MAX = 2.0
"""Between two questions, which get rarer."""
TRIAL_S_MAX = 180.0
"""An engine that is still trying then is taken for one that can't."""


class Movability:
    """Asks the engines that it is told of.

    Args:
        tell: gets ``ReplicaMovable``.
    """

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._upstream = Upstream(IngressSettings())
        self._api = EngineApi(self._upstream)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def ask(self, replica: str, model: str, *, url: str, api_key: str) -> None:
        """A replica is ready: find out."""
        ticket = Ticket("", replica, model, url=url, api_key=api_key, attempt=1)
        task = self._tasks[replica] = asyncio.get_running_loop().create_task(self._ask(ticket))
        task.add_done_callback(lambda _: self._tasks.pop(replica, None))

    def forget(self, replica: str) -> None:
        """It has ended."""
        if (task := self._tasks.get(replica)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Ask no more."""
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
        """Why it can't; empty if it can."""
        pause_s = ASK_S
        while True:
            reply = await self._api.state(ticket)
            if reply.status != 200:
                return f"its engine has no such route: it answers {reply.status}"
            if (can := reply.body.get("resume")) is not None:
                return "" if can else str(reply.body.get("reason") or "its engine says so")
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, ASK_S_MAX)
