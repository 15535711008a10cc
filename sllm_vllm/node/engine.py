"""One engine from its launch to the end of its log: process, output, health, and the phases of its start."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from sllm_vllm.daemon.run_loops import RunLoops, is_shortage
from sllm_vllm.daemon.unix_listener import HOST, socket_of_url
from sllm_vllm.node.core.events import EngineHealthy, EngineUnhealthy, Event
from sllm_vllm.node.core.failure import FailureWords
from sllm_vllm.node.core.load_line import read_load_line
from sllm_vllm.node.core.phases import StartPhase, StartPhases
from sllm_vllm.node.core.replica import ReplicaRow, State
from sllm_vllm.node.engine_process import EngineProcess, end_session
from sllm_vllm.node.logs import BoundedLog, OutputPipe
from sllm_vllm.node.ports import PortReservation
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport, StartReport
from sllm_vllm.node.running_time import within
from sllm_vllm.node.sockets import SocketReservation

# Whether an engine is healthy: polls its ``/health``, rapidly until the first success, then at intervals. An engine is
# not blamed for this process's own faults: time in which this process stood still does not count, and a check that it
# had no descriptor for counts as not made.


EAGER_S = 0.02
"""Between checks in the first seconds of a start; a refused connection costs a fraction of a millisecond."""
EAGER_FOR_S = 10.0
PATIENT_S = 0.2


def session_to(url: str) -> aiohttp.ClientSession:
    """A client for one engine, which makes a new connection for each check."""
    path = socket_of_url(url)
    connector = (
        aiohttp.TCPConnector(force_close=True, limit=0)
        if path is None
        else aiohttp.UnixConnector(path, force_close=True, limit=0)
    )
    return aiohttp.ClientSession(connector=connector)


def http_base(url: str) -> str:
    """The base URL of requests to the engine in that session."""
    return url if socket_of_url(url) is None else f"http://{HOST}"


async def wait_healthy(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> None:
    """Check until the first success, then return."""
    start_s = time.monotonic()
    while True:
        if await ask_health(session, url, answer_s=answer_s) == "":
            return
        await asyncio.sleep(EAGER_S if time.monotonic() - start_s < EAGER_FOR_S else PATIENT_S)


async def keep_asking(
    session: aiohttp.ClientSession, url: str, on_answer: Callable[[str], None], *, every_s: float
) -> None:
    """Check at intervals until cancelled; ``on_answer`` gets an empty string for a success, else the problem."""
    while True:
        await asyncio.sleep(every_s)
        if (problem := await ask_health(session, url, answer_s=every_s)) is not None:
            on_answer(problem)


async def ask_health(session: aiohttp.ClientSession, url: str, *, answer_s: float) -> str | None:
    """Check once; returns an empty string for a success, else the problem; None if the check could not be made."""
    try:
        return await within(answer_s, _ask(session, url))
    except TimeoutError:
        return f"no answer within {answer_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return None if is_shortage(error) else str(error) or type(error).__name__


async def _ask(session: aiohttp.ClientSession, url: str) -> str:
    while True:
        try:
            async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=None)) as answer:
                return "" if answer.status == 200 else f"it answered with status {answer.status}"
        except aiohttp.ClientConnectorError as error:
            if error.errno != errno.EAGAIN:
                raise
            await asyncio.sleep(EAGER_S)  # its backlog is full; TCP would wait instead


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
        if self._phase is not StartPhase.READY:  # the agent reports READY, after the first healthy answer
            self._on_change()

    def _at_s(self) -> float:
        return (self._end_s or time.monotonic()) - self._start_s


# What the agent keeps about a replica beside the core's record: its order, address, key and engine.


_SLUG_MAX = 40


def new_id(model: str, taken: Container[str]) -> str:
    """A new id for a replica of a model: the last part of the model's name and a few random digits."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-._")[:_SLUG_MAX]
    while (replica_id := f"{slug or 'model'}-{secrets.token_hex(2)}") in taken:
        pass
    return replica_id


@dataclass(slots=True)
class ReplicaRecord:
    """One replica. Owned by the agent's loop."""

    order: ReplicaOrder
    api_key: str
    reservation: PortReservation | SocketReservation
    log: Path
    ordered_s: float = field(default_factory=time.monotonic)
    engine: Engine | None = None
    was_ready: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change, and then replaced by a new event."""

    @property
    def process(self) -> EngineProcess | None:
        """Its engine's process, once there is one."""
        return self.engine.process if self.engine is not None else None

    def notify(self) -> None:
        """Wake all that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def report(self, row: ReplicaRow, *, in_state_s: float) -> ReplicaReport:
        """The replica's report."""
        engine = self.engine
        return ReplicaReport(
            id=row.id,
            model=row.model,
            state=row.state.value,
            reason=row.reason,
            slots=row.slots,
            pid=row.pid,
            status=row.status,
            port=self.reservation.port,
            url=self.reservation.url,
            api_key=self.api_key,
            age_s=time.monotonic() - self.ordered_s,
            in_state_s=in_state_s,
            start=engine.report() if engine is not None else None,
            log=str(self.log),
            tail=tuple(engine.tail) if engine is not None and row.state is State.FAILED else (),
            cause=engine.failure.cause if engine is not None and _ended_by_exception(row) else "",
            labels=self.order.labels,
        )


def _ended_by_exception(row: ReplicaRow) -> bool:
    """Whether it failed with Python's own exit status, or argparse's. The log of a killed one may hold exceptions that
    are not the cause."""
    return row.state is State.FAILED and row.status in {1, 2}
