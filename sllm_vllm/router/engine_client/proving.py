"""Finds out whether an engine has begun to generate an answer before any of it arrives. Data path.

A plain answer arrives only when it is whole. A request that an engine has begun to answer is unlikely to be what it
dies of; see ``core/deaths.py``.
"""

from __future__ import annotations

import asyncio

from sllm_vllm.router.engine_client.api import EngineApi
from sllm_vllm.router.engine_client.connection import EngineFailed
from sllm_vllm.router.gate import Gate
from sllm_vllm.router.migration.leg import Leg

FIRST_PAUSE_S = 0.5
"""Most answers have begun by then, so that the engine is not asked."""
PAUSE_S_MAX = 5.0


class Proving:
    """Asks one leg's engine, less and less often, until it has generated a token or ``cancel`` is called."""

    def __init__(self, leg: Leg, gate: Gate, api: EngineApi) -> None:
        self._leg = leg
        self._gate = gate
        self._api = api
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._pause_s = FIRST_PAUSE_S

    def begin(self) -> None:
        """Ask after a pause."""
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._ask_soon)
        self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    def cancel(self) -> None:
        """Stop asking."""
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _ask_soon(self) -> None:
        self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        try:
            num = await self._api.num_output_tokens(self._leg.ticket, self._leg.asked.shown)
        except EngineFailed:  # the leg's own connection reports the failure
            return
        if num:
            self._gate.first_token(self._leg.ticket)
        else:
            self.begin()
