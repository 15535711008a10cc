"""One engine of the cold-start benchmark, stock or ours: starts it, waits until it is healthy, ends it completely.

Times are this process's ``time.monotonic``. Everything runs on one event loop in the main thread, which the agents
share: the kernel ends an agent's cold engines when the thread that started them ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.common.supervise import Workspace
from benchmarks.common.vllm_server import HOST, LOG_LINES_SHOWN, MODEL_NAME, START_TIMEOUT_S, ServerFailed, VllmServer
from sllm_vllm.config import NodeConfig
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.core.phases import StartPhases
from sllm_vllm.node.engine import EAGER_S, ask_health
from sllm_vllm.node.engine_process import end_session, reap_adopted
from sllm_vllm.node.orphans import all_processes
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport

KV_CACHE_NBYTES = 1 << 28
ENGINE_ARGUMENTS = ("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(KV_CACHE_NBYTES))
"""The same for all ways."""
OVERRULING = ("VLLM_CPU_KVCACHE_SPACE",)
"""Environment variables that override these arguments; no engine gets them."""
WARM_TIMEOUT_S = 180.0
GONE_TIMEOUT_S = 30.0
_HEALTH_ANSWER_S = 5.0
_POLL_S = 0.05


class EngineFailed(Exception):
    """An engine did not start or end as it should. The message is written for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A healthy engine."""

    port: int
    api_key: str
    pid: int
    """Leader of the session that contains all of the engine's processes."""
    order_s: float
    healthy_s: float
    """Seconds since the order."""
    phases: Mapping[str, float]
    load: Mapping[str, str]
    is_warm: bool | None


class LogFollower:
    """Follows a growing log file and derives the phases of a start from it.

    Args:
        start_s: when the process was started; time zero of the phases.
    """

    def __init__(self, log: Path, start_s: float) -> None:
        self.phases = StartPhases()
        self._file = log.open("rb")
        self._start_s = start_s
        self._rest = b""
        self.phases.process_started(self._at_s())

    def read(self) -> None:
        """Process the lines written since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            for part in line.decode(errors="replace").split("\r"):
                self.phases.note(part, self._at_s())

    async def run(self) -> None:
        """Process lines as they are written, until cancelled."""
        while True:
            self.read()
            await asyncio.sleep(EAGER_S)

    def finish(self, healthy_s: float) -> dict[str, float]:
        """Close the log and return the seconds by phase; call it once the engine is healthy."""
        self.read()
        self._file.close()
        self.phases.became_ready(healthy_s)
        return {phase.name.lower(): seconds for phase, seconds in self.phases.timings(healthy_s).seconds.items()}

    def _at_s(self) -> float:
        return time.monotonic() - self._start_s


@contextlib.asynccontextmanager
async def running_agent(workspace: Workspace, name: str, *, warm: bool, slots: int = 1) -> AsyncIterator[NodeAgent]:
    """Run a node agent in this process."""
    config = NodeConfig(
        node_dir=workspace.tmp / name,
        store_dir=store_dir_of(workspace),
        store_socket=store_socket_of(workspace),
        slots=slots,
        warm=warm,
    )
    agent = NodeAgent(config)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.close()


def store_dir_of(workspace: Workspace) -> Path:
    """Directory in which our loader keeps its checkpoints."""
    return workspace.run / "store"


def store_socket_of(workspace: Workspace) -> Path:
    """Socket of the store's daemon, when one runs."""
    return workspace.tmp / "store.socket"


async def wait_warm(agent: NodeAgent) -> int:
    """Wait until the agent's warm parent is ready to fork; return its process id.

    Raises:
        EngineFailed: it was not ready after ``WARM_TIMEOUT_S``.
    """
    deadline_s = time.monotonic() + WARM_TIMEOUT_S
    while time.monotonic() < deadline_s:
        report = await agent.report()
        if report.warm.pid is not None:
            return report.warm.pid
        await asyncio.sleep(_POLL_S)
    raise EngineFailed(f"there is no warm parent: {report.warm.problem}")


@contextlib.asynccontextmanager
async def stock_engine(model: Path, workspace: Workspace) -> AsyncIterator[Ready]:
    """Run ``vllm serve`` with vLLM's own loader. All its processes are gone when the context ends.

    Raises:
        EngineFailed: the engine ended, or did not become healthy in time.
    """
    log = workspace.run / "vllm.log"
    server = VllmServer(
        model, [*ENGINE_ARGUMENTS, "--load-format", "auto"], environment={}, log=log, without=OVERRULING
    )
    with contextlib.ExitStack() as stack:
        order_s = time.monotonic()
        stack.enter_context(server)
        try:
            follower = LogFollower(log, order_s)
            healthy_s = await _wait_healthy(server, follower, order_s)
            yield Ready(
                port=server.port,
                api_key="",
                pid=server.pid,
                order_s=order_s,
                healthy_s=healthy_s,
                phases=follower.finish(healthy_s),
                load={},
                is_warm=None,
            )
        except ServerFailed as error:
            kept = shutil.copy(log, workspace.cache / "failed.log")
            raise EngineFailed(f"stock: {error}\n{server.log_tail()}\nthe whole log is in {kept}") from None
        finally:
            await _stop_stock(server.pid, stack)


async def _wait_healthy(server: VllmServer, follower: LogFollower, order_s: float) -> float:
    """Wait until the server is healthy, following its log meanwhile; return the seconds since the order."""
    following = asyncio.get_running_loop().create_task(follower.run())
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while await ask_health(session, f"http://{HOST}:{server.port}", answer_s=_HEALTH_ANSWER_S):
                server.check_alive()
                if time.monotonic() - order_s > START_TIMEOUT_S:
                    raise ServerFailed(f"it was not healthy after {START_TIMEOUT_S:.0f} s")
                await asyncio.sleep(EAGER_S)
            return time.monotonic() - order_s
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _stop_stock(pid: int, stack: contextlib.ExitStack) -> None:
    """Close the server's context; reap what this process adopts meanwhile, as an agent has made it a subreaper."""
    stopping = asyncio.get_running_loop().create_task(asyncio.to_thread(stack.close))
    while not stopping.done():
        reap_adopted({pid})
        await asyncio.wait([stopping], timeout=_POLL_S)
    await stopping
    await _wait_gone(pid)


@contextlib.asynccontextmanager
async def our_engine(agent: NodeAgent, model: Path, workspace: Workspace) -> AsyncIterator[Ready]:
    """Run an engine of the agent. All its processes are gone when the context ends.

    Raises:
        EngineFailed: the engine did not become ready.
    """
    order = ReplicaOrder(model=str(model), arguments=(*ENGINE_ARGUMENTS, "--served-model-name", MODEL_NAME))
    order_s = time.monotonic()
    replica = await agent.ensure_replica(order)
    pid = replica.pid
    try:
        report = await _settled(agent, replica.id)
        healthy_s = time.monotonic() - order_s
        if not report.is_ready or report.start is None or report.port is None or report.pid is None:
            raise EngineFailed(_failure(report, workspace))
        yield Ready(
            port=report.port,
            api_key=report.api_key or "",
            pid=report.pid,
            order_s=order_s,
            healthy_s=healthy_s,
            phases=report.start.seconds,
            load=report.start.load,
            is_warm=report.start.is_warm,
        )
    finally:
        await agent.stop_replica(replica.id)
        async for report in agent.watch(replica.id):
            pid = report.pid
        if pid is not None:
            await _wait_gone(pid)


async def _settled(agent: NodeAgent, replica_id: str) -> ReplicaReport:
    async for report in agent.watch(replica_id):
        if report.is_ready or report.has_ended:
            break
    return report


def _failure(report: ReplicaReport, workspace: Workspace) -> str:
    kept = shutil.copy(report.log, workspace.cache / "failed.log")
    tail = "\n".join(report.tail[-LOG_LINES_SHOWN:])
    return f"{report.id}: {report.state} ({report.reason})\n{tail}\nthe whole log is in {kept}"


async def _wait_gone(session: int) -> None:
    """Wait until no process of the engine's session is left.

    Raises:
        EngineFailed: some processes did not end.
    """
    if not await end_session(session, timeout_s=GONE_TIMEOUT_S):
        raise EngineFailed(f"processes of session {session} do not end")


def session_cpu_s(leader: int) -> float:
    """Processor seconds used by a session's living processes and by the children that they have reaped."""
    ticks = 0
    for process in all_processes():
        if process.session == leader:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
