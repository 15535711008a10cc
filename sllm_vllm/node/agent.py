"""The node agent: owns this node's accelerator slots and their engines, and carries out what ``core/agent.py`` decides.

One object on one event loop, which must run in the process's main thread: the kernel ends cold engines when the thread
that started them ends. ``server.py`` serves it on a socket; the router holds it in its own process, or as a Ray actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path

from sllm_vllm import __version__
from sllm_vllm.config import NodeConfig
from sllm_vllm.daemon.file_limit import Spare
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.errors import ConfigError, NodeError, OrderRefused, ReplicaUnknown
from sllm_vllm.node.core.agent import AgentCore, AgentLimits
from sllm_vllm.node.core.events import (
    Action,
    AgentTicked,
    EngineExited,
    EngineNotStarted,
    EngineStarted,
    Event,
    KillEngine,
    RefuseOrder,
    ReplicaOrdered,
    ReplicaSpec,
    StartEngine,
    StopAsked,
    TellState,
    TerminateEngine,
)
from sllm_vllm.node.core.launch import (
    UNGUARDED_OPTIONS,
    UNREACHABLE_OPTIONS,
    has_option,
    num_slots_of,
    option_value,
)
from sllm_vllm.node.core.replica import ENDED, WELL_ONCE, ReplicaRow, State
from sllm_vllm.node.engine import Engine, ReplicaRecord, new_id
from sllm_vllm.node.engine_config import expand_config
from sllm_vllm.node.engine_process import reap_adopted
from sllm_vllm.node.logs import BoundedLog, read_log, remove_log, remove_old_logs
from sllm_vllm.node.model_path import require_model
from sllm_vllm.node.orphans import DeathWatch, Record, sweep
from sllm_vllm.node.ports import PortReservation, Ports
from sllm_vllm.node.protocol import EngineTiming, NodeReport, ReplicaOrder, ReplicaReport, SlotReport
from sllm_vllm.node.residency import hint_store, prefetch_checkpoint, read_residency
from sllm_vllm.node.sockets import EngineSockets, SocketReservation
from sllm_vllm.node.starter import open_starter

logger = logging.getLogger(__name__)

TIMINGS_MAX = 64
_TICK_S = 1.0
_STALL_S = 1.0
"""A tick that is later than this is logged."""
_SPARE_DESCRIPTORS = 4
"""For listing processes, and for starting a new death watch."""
_WATCH_S = 0.1
_CLOSE_MARGIN_S = 10.0
_KEY_NBYTES = 24
_SESSIONS_MAX = 1024
_SETTLED = {state.value for state in (State.WAITING, *WELL_ONCE)}
_OVER = {state.value for state in ENDED}
_PR_SET_CHILD_SUBREAPER = 36


def _limits_of(config: NodeConfig) -> AgentLimits:
    return AgentLimits(
        start_s=config.start_s,
        stop_s=config.stop_s,
        unwell_max=config.unwell_max,
        orders_max=config.orders_max,
        ended_max=config.ended_max,
    )


def _expanded(order: ReplicaOrder) -> tuple[str, ...]:
    """The order's arguments, with those of a ``--config`` file."""
    try:
        return expand_config(order.arguments, order.directory)
    except ConfigError as error:
        raise OrderRefused(order.model, str(error), "give a file that vLLM can read, or none") from None


def _require_reachable(model: str, arguments: Sequence[str]) -> None:
    """Refuse arguments that make an engine listen at another address, or for everyone."""
    for name in UNREACHABLE_OPTIONS:
        if has_option(arguments, name):
            raise OrderRefused(model, f"{name}: the agent chooses the address", "leave it out")
    for name in UNGUARDED_OPTIONS:
        if has_option(arguments, name):
            raise OrderRefused(model, f"{name}: it opens a port that needs no key", "leave it out")


class NodeAgent:
    """Starts, watches and ends the engines of a node; refuses orders that its slots can't hold.

    Args:
        loops: runs and supervises the agent's loops.
        clock: the core's clock, in seconds; tests make it jump.
    """

    is_here = True
    """The agent runs in its caller's process; see ``router/engines.py``."""

    def __init__(
        self, config: NodeConfig, *, loops: RunLoops | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._clock = clock
        self._loops = loops or RunLoops()
        self._ticking: asyncio.Task[None] | None = None
        self._ticked_s = time.monotonic()
        self._spare = Spare(0)
        self._started_s = time.monotonic()
        self._records: dict[str, ReplicaRecord] = {}
        self._timings: deque[EngineTiming] = deque(maxlen=TIMINGS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ports = Ports(config.engine_host)
        self._sockets = EngineSockets(config.node_dir)
        self._orphans = Record(config.record_path)
        self._death_watch = DeathWatch(config.record_path)
        self._sessions: deque[int] = deque(maxlen=_SESSIONS_MAX)
        self._is_closing = False

    # --------------------------------------------------------------------------------------------------- interface

    @property
    def num_slots(self) -> int:
        """The number of slots; known once the agent has started."""
        return self._starter.num_slots

    async def start(self) -> None:
        """End what a previous agent left behind, detect the hardware, and let the warm parent import.

        Raises:
            ConfigError: a GPU that was named is not there. NodeError: the agent's folder can't be used.
        """
        config = self.config
        try:
            config.log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            await asyncio.to_thread(remove_old_logs, config.log_dir, keep_max=config.ended_max)
        except OSError as error:
            raise NodeError(config.log_dir, f"it can't be used ({error.strerror})", "give another --node-dir") from None
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for pid in await asyncio.to_thread(sweep, config.record_path):
            logger.warning("event=orphan_killed pid=%d", pid)
        self._sockets.clear()
        starter = self._starter = await open_starter(config)
        self._death_watch.start()
        self._core = AgentCore(starter.num_slots, _limits_of(config))
        self._spare = Spare(_SPARE_DESCRIPTORS)
        self._ticked_s = time.monotonic()
        self._ticking = self._loops.start("the agent's tick", self._tick)
        logger.info("event=agent_started platform=%s slots=%d", starter.hardware.platform, starter.num_slots)

    async def close(self) -> None:
        """End all engines, then the warm parent; does nothing if called again."""
        if self._is_closing:
            return
        self._is_closing = True
        for row in self._core.snapshot():
            if row.state not in ENDED:
                self._happened(StopAsked(row.id))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.stop_s + _CLOSE_MARGIN_S):
                for row in self._core.snapshot():
                    async for _ in self.watch(row.id):
                        pass
        tasks = [*self._tasks, *([self._ticking] if self._ticking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._starter.close()
        self._reap_adopted()
        self._spare.close()
        self._sockets.clear()
        self._death_watch.close()
        logger.info("event=agent_stopped")

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        """Start a replica, or queue it for slots if the order waits.

        Raises:
            OrderRefused: no slot is free, the port is taken, another replica has or had this id.
        """
        arguments = order.arguments
        if self.config.engine_command is None:  # a custom command has arguments of its own
            await asyncio.to_thread(require_model, order.model, order.directory)
            arguments = await asyncio.to_thread(_expanded, order)
        replica_id = order.id or new_id(order.model, self._records)
        if self._is_closing:
            raise OrderRefused(order.model, "the agent is stopping", "order again when it is back")
        ended = self._ended_record(replica_id) if order.reuses_id else None
        if replica_id not in self._records or ended is not None:
            _require_reachable(order.model, arguments)
            self._admit(replica_id, order)
        spec = ReplicaSpec(
            id=replica_id,
            model=order.model,
            arguments=order.arguments,
            environment=tuple(sorted(order.environment.items())),
            num_slots=order.num_slots or num_slots_of(arguments),
            start_s=order.start_s,
        )
        refusals = self._happened(ReplicaOrdered(spec, order.waits, order.reuses_id))
        if ended is not None:
            self._replaced(replica_id, ended, is_refused=bool(refusals))
        if refusals:
            reason = refusals[0].reason
            mend = "stop a replica, or wait for one (`run --wait`)" if "slots wanted" in reason else "order otherwise"
            raise OrderRefused(order.model, reason, mend)
        return self.replica(replica_id)

    async def wait_warm(self, timeout_s: float) -> bool:
        """Wait until engines can start warm; returns False if they can't within ``timeout_s``, or ever."""
        return await self._starter.wait_warm(timeout_s)

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        """Ask a replica to end; does nothing if it has ended.

        Raises:
            ReplicaUnknown: there is none of this id.
        """
        self._row(replica_id)
        self._happened(StopAsked(replica_id))
        return self.replica(replica_id)

    def replica(self, replica_id: str) -> ReplicaReport:
        """The replica's current report.

        Raises:
            ReplicaUnknown: there is none of this id.
        """
        row = self._row(replica_id)
        return self._records[replica_id].report(row, in_state_s=max(0.0, self._clock() - row.since_s))

    def find(self, prefix: str) -> str:
        """The one id with this prefix: among living replicas, else among all; an exact match comes first.

        Raises:
            ReplicaUnknown: there is none, or several.
        """
        rows = [row for row in self._core.snapshot() if row.id.startswith(prefix)]
        exact = [row for row in rows if row.id == prefix]
        living = [row for row in rows if row.state not in ENDED]
        for found in (exact, living, rows):
            if len(found) == 1:
                return found[0].id
        if not rows:
            raise ReplicaUnknown(prefix, "no replica has this id", "see `sllm-vllm ps --all`")
        raise ReplicaUnknown(prefix, f"{len(rows)} replicas have ids with this prefix", "give more of the id")

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        """Yield the replica's report now, at every change, and ten times a second while it starts; returns once it has
        ended."""
        while (record := self._records.get(replica_id)) is not None:
            changed, report = record.changed, self.replica(replica_id)
            yield report
            if report.has_ended:
                return
            wait_s = None if report.state in _SETTLED else _WATCH_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()

    async def prefetch(self, checkpoint: str) -> None:
        """Have the store read a checkpoint into memory.

        Raises:
            StoreError: there is no store, or it refuses. CheckpointError, RemoteError: the checkpoint can't be read.
        """
        await asyncio.to_thread(prefetch_checkpoint, self.config, checkpoint)

    async def prefetch_model(self, arguments: tuple[str, ...]) -> None:
        """Have the store read the checkpoint that an engine with these arguments would load; the model comes first."""
        if option_value(arguments, "--load-format") is None:
            arguments = (*arguments, "--load-format", self.config.load_format)
        await asyncio.to_thread(hint_store, self.config, arguments)

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        """The state of the whole node. ``with_memory`` measures the warm parent's memory, which takes a moment."""
        residency = await asyncio.to_thread(read_residency, self.config)
        warm = await self._starter.report(with_memory=with_memory)
        rows = self._core.snapshot()
        owners = {slot: row.id for row in rows for slot in row.slots}
        return NodeReport(
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_s,
            platform=self._starter.hardware.platform,
            slots=tuple(
                SlotReport(slot=slot, what=self._starter.describe_slot(slot), replica=owners.get(slot))
                for slot in range(self._starter.num_slots)
            ),
            replicas=tuple(self.replica(row.id) for row in rows),
            warm=warm,
            checkpoints=residency.checkpoints,
            hops=dict(residency.hops),
            store=residency.problem,
            timings=tuple(self._timings),
            problem=self._loops.problem,
        )

    def logs(self, replica_id: str, *, tail_nbytes: int | None, follow: bool) -> AsyncIterator[bytes]:
        """A replica's output so far; with ``follow``, also its later output until it has ended.

        Raises:
            ReplicaUnknown: there is none of this id.
        """
        self._row(replica_id)

        def is_over() -> bool:
            row = self._core.row(replica_id)
            return not follow or row is None or row.state in ENDED

        return read_log(self._log_path(replica_id), tail_nbytes=tail_nbytes, is_over=is_over)

    def story(self, replica_id: str) -> list[str]:
        """The replica's last events and actions, oldest first; raises ``ReplicaUnknown``."""
        self._row(replica_id)
        now_s = self._clock()
        return [f"{at_s - now_s:+.3f} s  {_in_words(what)}" for at_s, what in self._core.story(replica_id)]

    # ------------------------------------------------------------------------------------------------------ effects

    def _happened(self, event: Event) -> list[RefuseOrder]:
        """Pass an event to the core and carry out its actions; returns the refusals of an order."""
        refusals = []
        for action in self._core.handle(event, self._clock()):
            match action:
                case StartEngine():
                    self._in_background(self._run(action))
                case TerminateEngine() | KillEngine():
                    self._end(action)
                case RefuseOrder():
                    refusals.append(action)
                case TellState():
                    self._tell(action)
        for replica_id in [name for name in self._records if self._core.row(name) is None]:
            self._forget(replica_id)
        return refusals

    async def _run(self, start: StartEngine) -> None:
        """Run one engine from its start to its end. Whatever fails, the core gets the end event, so that slots are
        released."""
        spec, record = start.spec, self._records[start.spec.id]
        place = record.reservation.place(start.slots, record.api_key)
        try:
            log = BoundedLog(record.log, self.config.log_bytes)
            engine = Engine(spec.id, log, on_event=self._happened, on_change=record.notify)
            record.engine = engine
            process = await self._starter.start(engine, spec, place, directory=record.order.directory)
        except Exception as error:  # top of a run loop
            if not isinstance(error, OSError | ValueError):  # ValueError: an argument that no process can take
                logger.exception("event=start_failed replica=%s", spec.id)
            self._let_go(record)
            self._happened(EngineNotStarted(spec.id, f"no process: {getattr(error, 'strerror', None) or error}"))
            return
        self._sessions.append(process.pid)
        self._orphans.add(process.pid)
        self._happened(EngineStarted(spec.id, process.pid))
        try:
            status = await engine.run(record.reservation.url, health_s=self.config.health_s)
        except Exception:  # top of a run loop
            logger.exception("event=engine_not_watched replica=%s", spec.id)
            process.kill()
            status = await process.wait()
        finally:
            process.kill()
            self._let_go(record)
        self._orphans.remove(process.pid)
        self._happened(EngineExited(spec.id, status))

    def _let_go(self, record: ReplicaRecord) -> None:
        """Release what an engine that is gone, or never started, has used."""
        record.reservation.close()
        if record.engine is not None:
            record.engine.pipe.close()
            self._starter.tidy(record.engine)

    def _end(self, action: TerminateEngine | KillEngine) -> None:
        """End a process, or call off its start. If the process appears all the same, the core orders its end again."""
        record = self._records.get(action.replica)
        if record is not None and record.engine is not None:
            record.engine.called_off.set()
        if record is None or record.process is None:
            return
        if isinstance(action, KillEngine):
            record.process.kill()
        else:
            record.process.terminate()

    def _tell(self, told: TellState) -> None:
        record = self._records[told.replica]
        logger.info("event=replica id=%s state=%s reason=%r", told.replica, told.state, told.reason)
        engine = record.engine
        if told.state == State.READY.value and engine is not None and not record.was_ready:
            record.was_ready = True
            self._starter.learn(engine)
            model, now_s, start = record.order.model, time.time(), engine.report()
            self._timings.append(EngineTiming(replica=told.replica, model=model, ended_unix_s=now_s, start=start))
        if told.state in _OVER:
            record.reservation.close()
        record.notify()

    def _admit(self, replica_id: str, order: ReplicaOrder) -> None:
        """Make the record of a new order and reserve its address."""
        reservation = self._reserved(order)
        key = option_value(order.arguments, "--api-key") or secrets.token_urlsafe(_KEY_NBYTES)
        log = self._log_path(replica_id)
        with contextlib.suppress(OSError):
            log.touch(0o600)  # so that it can be followed before there is a process
        self._records[replica_id] = ReplicaRecord(order, key, reservation, log)

    def _reserved(self, order: ReplicaOrder) -> PortReservation | SocketReservation:
        """Reserve the address where the engine is to listen.

        Raises:
            OrderRefused: it can't be reserved.
        """
        try:
            if order.takes_socket and self.config.has_engine_sockets:
                return self._sockets.reserve()
            return self._ports.reserve(order.port)
        except OSError as error:
            what, mend = f"port {order.port}", "give another --port, or none"
            if order.takes_socket and self.config.has_engine_sockets:
                what, mend = "a folder for its socket", "make the agent's folder, or the temporary one, writable"
            raise OrderRefused(order.model, f"{what} can't be had ({error.strerror})", mend) from None

    def _ended_record(self, replica_id: str) -> ReplicaRecord | None:
        """The record of a replica that has ended and is still known."""
        row = self._core.row(replica_id)
        return self._records.get(replica_id) if row is not None and row.state in ENDED else None

    def _replaced(self, replica_id: str, ended: ReplicaRecord, *, is_refused: bool) -> None:
        """Give the id of an ended replica to a new one with an empty log; if that was refused, keep the ended one."""
        if is_refused:
            self._records[replica_id].reservation.close()
            self._records[replica_id] = ended
            return
        remove_log(ended.log)
        with contextlib.suppress(OSError):
            ended.log.touch(0o600)

    def _forget(self, replica_id: str) -> None:
        """Drop the record and the log of a replica that the core no longer knows."""
        record = self._records.pop(replica_id)
        record.reservation.close()
        remove_log(record.log)
        record.notify()

    async def _tick(self) -> None:
        """Do what is due every second."""
        await asyncio.sleep(_TICK_S)
        now_s = time.monotonic()
        stood_s, self._ticked_s = now_s - self._ticked_s - _TICK_S, now_s
        if stood_s > _STALL_S:
            logger.warning("event=agent_stood_still seconds=%.1f", stood_s)
        self._happened(AgentTicked())
        with self._spare.lent():
            self._death_watch.ensure()
        self._reap_adopted()

    def _reap_adopted(self) -> None:
        with self._spare.lent():
            reap_adopted({*self._sessions, *self._starter.parents})

    def _row(self, replica_id: str) -> ReplicaRow:
        row = self._core.row(replica_id)
        if row is None or replica_id not in self._records:
            raise ReplicaUnknown(replica_id, "no replica has this id", "see `sllm-vllm ps --all`")
        return row

    def _log_path(self, replica_id: str) -> Path:
        return self.config.log_dir / f"{replica_id}.log"

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=task_failed", exc_info=error)


def _in_words(what: Event | Action) -> str:
    facts = {name: getattr(what, name) for name in what.__slots__ if name not in {"replica", "spec"}}
    told = " ".join(f"{name}={value!r}" for name, value in facts.items())
    return f"{type(what).__name__} {told}".rstrip()
