"""One engine from its launch to the end of its log: process, output, health, and the phases of its start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.node.core.events import EngineHealthy, EngineUnhealthy, Event
from sllm_vllm.node.core.failure import FailureWords
from sllm_vllm.node.core.load_line import read_load_line
from sllm_vllm.node.core.phases import Phase, StartPhases
from sllm_vllm.node.engine_process import EngineProcess
from sllm_vllm.node.health import http_base, keep_asking, session_to, wait_healthy
from sllm_vllm.node.logs import BoundedLog, OutputPipe
from sllm_vllm.node.protocol import StartReport
from sllm_vllm.node.running_time import within
from sllm_vllm.node.sessions import end_session

logger = logging.getLogger(__name__)

TAIL_LINES = 30
TAIL_LINE_MAX = 400
"""Characters kept of each of the last lines."""
_DRAIN_S = 2.0
"""Longest wait for the rest of an ended process's output."""
_SESSION_S = 10.0
"""Longest wait until an ended engine's other processes have ended: the kernel may have gigabytes to free."""


class Engine:
    """State of one engine while it starts, runs and ends. Lives on the agent's loop.

    Args:
        on_event: receives ``EngineHealthy`` and ``EngineUnhealthy``.
        on_change: called when the start's phase changes.
    """

    def __init__(
        self, replica: str, log: BoundedLog, *, on_event: Callable[[Event], object], on_change: Callable[[], None]
    ) -> None:
        self.replica = replica
        self._loops = RunLoops(self._not_judged)
        self.process: EngineProcess | None = None
        self.scratch: Path | None = None
        """Its temporary directory, if it has one of its own."""
        self.is_warm: bool | None = None
        self.cold_reason = ""
        self.called_off = asyncio.Event()
        """Set to end it before it has a process."""
        self.is_beside_import = False
        """Whether a warm parent imported while it started cold, so that both took longer."""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.failure = FailureWords()
        self._on_event = on_event
        self._on_change = on_change
        self._start_s = time.monotonic()
        self._end_s: float | None = None
        self._phases = StartPhases()
        self._phase = self._phases.phase
        self._load: dict[str, str] = {}
        self._log = log
        self.pipe = OutputPipe(log, self._note)

    def awaits_parent(self) -> None:
        """Record that it waits to be forked until the warm parent has imported."""
        self._phases.parent_awaited(self._at_s())
        self._log_phase()

    def started(self, process: EngineProcess, cold_reason: str) -> None:
        """Record that its process runs. ``cold_reason``: why it was not forked; empty if it was."""
        self.process, self.is_warm, self.cold_reason = process, not cold_reason, cold_reason
        self.pipe.close_writer()
        self._phases.process_started(self._at_s())
        self._log_phase()

    async def run(self, url: str, *, health_s: float) -> int:
        """Watch it until it has ended and none of its processes is left; returns its exit status, or minus the signal
        that ended it."""
        assert self.process is not None
        asking = self._loops.start(f"health of {self.replica}", lambda: self._ask(url, health_s))
        try:
            status = await self.process.wait()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        if not await end_session(self.process.pid, timeout_s=_SESSION_S):
            logger.warning("event=processes_left replica=%s session=%d", self.replica, self.process.pid)
        await self.drain()
        self._end_s = time.monotonic()
        return status

    async def drain(self) -> None:
        """Read the rest of its output."""
        with contextlib.suppress(TimeoutError):
            await within(_DRAIN_S, self.pipe.wait_closed())
        self.pipe.close()

    def report(self) -> StartReport:
        """The report of its start so far; complete once it is ready."""
        timings = self._phases.timings(self._at_s())
        return StartReport(
            phase=timings.phase.value,
            seconds={phase.name.lower(): round(seconds, 4) for phase, seconds in timings.seconds.items()},
            total_s=round(timings.total_s, 4),
            nbytes=timings.nbytes,
            is_warm=self.is_warm,
            cold_reason=self.cold_reason,
            load=self._load,
        )

    async def _ask(self, url: str, health_s: float) -> None:
        async with session_to(url) as session:
            await wait_healthy(session, http_base(url), answer_s=health_s)
            self._phases.became_ready(self._at_s())
            self._on_event(EngineHealthy(self.replica))
            await keep_asking(session, http_base(url), self._answered, every_s=health_s)

    def _not_judged(self, reason: str) -> None:
        """End an engine whose health can't be checked any more: it could hang unnoticed."""
        logger.error("event=engine_not_judged replica=%s reason=%r", self.replica, reason)
        if self.process is not None:
            self.process.kill()

    def _answered(self, problem: str) -> None:
        self._on_event(EngineUnhealthy(self.replica, problem) if problem else EngineHealthy(self.replica))

    def _note(self, line: str) -> None:
        for part in line.split("\r"):
            self._phases.note(part, self._at_s())
        self.failure.note(line)
        if line.strip():
            self.tail.append(line.rpartition("\r")[2][:TAIL_LINE_MAX])
        if not self._load:
            self._load = read_load_line(line)
        if self._phases.phase is not self._phase:
            self._log_phase()

    def _log_phase(self) -> None:
        self._phase = self._phases.phase
        if self._phase is not Phase.READY:  # the agent reports READY, after the first healthy answer
            self._on_change()

    def _at_s(self) -> float:
        return (self._end_s or time.monotonic()) - self._start_s
