"""Loops that a daemon depends on: each survives passing errors, and ends the daemon if errors persist.

A loop repeats a *step*. A step that fails is logged and retried after a pause that grows with each failure. A shortage
of descriptors, memory or threads never ends a daemon, however long it lasts; other errors end it once
``FAILURES_MAX`` of them occur within ``WINDOW_S``. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
PAUSE_S_MAX = 5.0
SHORTAGE_PAUSE_S_MAX = 1.0
"""Longest pause after a shortage, which may end at any moment; a loop that accepts connections should not delay them.
"""
FAILURES_MAX = 8
WINDOW_S = 60.0
SETTLED_S = 10.0
"""A failed loop counts as working again once a step has run this long without an error, e.g. waiting for connections.
"""
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

Step = Callable[[], Awaitable[None]]
GiveUp = Callable[[str], None]
"""Called with one line that names the loop and its last error."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that descriptors, memory or threads have run out, which may pass soon."""
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "new thread" in str(error))


@dataclass(slots=True, eq=False)
class _Loop:
    name: str
    problem: str = ""
    """The last error; empty if a step has succeeded since."""
    step_s: float = 0.0
    """When the current step began, or when the last one failed (``time.monotonic``)."""
    failures_s: deque[float] = field(default_factory=lambda: deque(maxlen=FAILURES_MAX))
    """When the last steps failed, not counting shortages."""
    has_ended: bool = False

    @property
    def works(self) -> bool:
        return not self.problem or (not self.has_ended and time.monotonic() - self.step_s > SETTLED_S)


class RunLoops:
    """The loops of a daemon, or of a part of it.

    Args:
        give_up: called once for each loop that has ended for good; it is to end the daemon.
    """

    def __init__(self, give_up: GiveUp = lambda reason: None) -> None:
        self._give_up = give_up
        self._loops: dict[asyncio.Task[None], _Loop] = {}

    @property
    def problem(self) -> str:
        """The loops that are failing now, with their last errors; empty if there are none."""
        return "; ".join(f"{one.name}: {one.problem}" for one in self._loops.values() if not one.works)

    def start(self, name: str, step: Step) -> asyncio.Task[None]:
        """Repeat ``step`` until the returned task is cancelled."""
        loop = _Loop(name)
        task = asyncio.get_running_loop().create_task(self._run(loop, step), name=name)
        self._loops[task] = loop
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a loop that was cancelled; one that has given up is still reported as a problem."""
        if task.cancelled():
            del self._loops[task]

    async def _run(self, loop: _Loop, step: Step) -> None:
        pause_s = PAUSE_S
        while not loop.has_ended:
            loop.step_s = time.monotonic()
            try:
                await step()
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                self._failed(loop, error)  # something that the step awaited was cancelled, not the loop
            except Exception as error:  # top of a run loop
                self._failed(loop, error)
            else:
                pause_s, loop.problem = PAUSE_S, ""
                await asyncio.sleep(0)  # let other tasks run: a step may never wait for anything
                continue
            if not loop.has_ended:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, SHORTAGE_PAUSE_S_MAX if not loop.failures_s else PAUSE_S_MAX)

    def _failed(self, loop: _Loop, error: BaseException) -> None:
        now_s = loop.step_s = time.monotonic()
        loop.problem = f"{type(error).__name__}: {error}"
        trace = None if isinstance(error, OSError) else error
        if not is_shortage(error):
            loop.failures_s.append(now_s)
        logger.error("event=loop_failed loop=%r reason=%r", loop.name, loop.problem, exc_info=trace)
        if len(loop.failures_s) == FAILURES_MAX and now_s - loop.failures_s[0] < WINDOW_S:
            loop.has_ended = True
            logger.critical("event=loop_ended loop=%r failures=%d seconds=%.0f", loop.name, FAILURES_MAX, WINDOW_S)
            self._give_up(f"{loop.name} failed {FAILURES_MAX} times, the last time with {loop.problem}")
