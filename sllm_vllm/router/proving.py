"""Whether an engine has begun to generate an answer of which nothing is seen yet: a plain one comes whole. Data path.

What an engine has begun to answer it does not die of, most likely; see ``core/deaths.py``.
"""

from __future__ import annotations

import asyncio

from sllm_vllm.router.engine_api import EngineApi
from sllm_vllm.router.gate import Gate
from sllm_vllm.router.leg import Leg
from sllm_vllm.router.upstream import EngineFailed

FIRST_PAUSE_S = 0.5
"""Most answers have begun by then, and nobody is asked."""
PAUSE_S_MAX = 5.0


class Proving:
    """Asks the engine of one leg, more and more rarely, until it has a token or ``cancel`` is called."""

    def __init__(self, leg: Leg, gate: Gate, api: EngineApi) -> None:
        self._leg = leg
        self._gate = gate
        self._api = api
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._pause_s = FIRST_PAUSE_S

    def begin(self) -> None:
        """Ask after a while."""
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._ask_soon)
        self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    def cancel(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _ask_soon(self) -> None:
        self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        try:
            num = await self._api.num_output_tokens(self._leg.ticket, self._leg.asked.shown)
        except EngineFailed:  # its own connection will tell
            return
        if num:
            self._gate.first_token(self._leg.ticket)
        else:
            self.begin()
