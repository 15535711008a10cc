"""Timeouts that only count time in which this loop ran: a loop that stood still can't judge whether others were late.

After a process was stopped (SIGSTOP, a debugger, a machine that slept) or its loop blocked, all its timers are due at
once, and answers that arrived meanwhile are unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

BEAT_S = 0.25
STALL_S = 0.5
"""A beat that is later than this is not counted."""

T = TypeVar("T")


async def within(timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` for ``timeout_s`` at most, not counting beats in which the loop stood still.

    Raises:
        TimeoutError: it takes longer; it was cancelled.
    """
    loop = asyncio.get_running_loop()
    task, ran_s = loop.create_task(work), 0.0
    try:
        while ran_s < timeout_s:
            beat_s, began_s = min(BEAT_S, timeout_s - ran_s), loop.time()
            done, _ = await asyncio.wait([task], timeout=beat_s)
            if done:
                return task.result()
            passed_s = loop.time() - began_s
            if passed_s < beat_s + STALL_S:
                ran_s += max(passed_s, beat_s)
        raise TimeoutError
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
