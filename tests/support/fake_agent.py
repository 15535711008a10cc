"""An agent without engines, with the real agent's methods: what a model does is in its name.

``slow`` loads until it is told to stop, ``waits`` gets no slots, ``fails`` ends with status 1, ``refused`` is refused,
``dies`` takes the agent with it, ``unsaid`` breaks the agent's own code; any other is ready after a moment,
``on-socket`` on a Unix socket. Run as a program, it is an agent's process on the directory it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sllm_vllm.config import NodeConfig
from sllm_vllm.daemon.unix_listener import listening, make_private_directory
from sllm_vllm.errors import OrderRefused, ReplicaUnknown, StoreUnavailable
from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.daemon import WORDS, serve
from sllm_vllm.node.protocol import (
    CheckpointReport,
    EngineTiming,
    NodeReport,
    ReplicaOrder,
    ReplicaReport,
    SlotReport,
    StartReport,
    WarmReport,
)
from sllm_vllm.node.server import Agent, AgentServer

KEY = "sk-this-is-secret"
ANSWER_MAX_S = 300.0
"""As ``tests.support.waiting.DEADLINE_S``, which it does not find as a program."""
T = TypeVar("T")


def start_report(phase: str, *, total_s: float = 0.5, is_warm: bool = True) -> StartReport:
    """A start that is in this phase."""
    seconds = {"starting the process": 0.1, "loading weights": total_s - 0.1}
    reason = "" if is_warm else "the warm parent is importing"
    return StartReport(
        phase=phase, seconds=seconds, total_s=total_s, nbytes=3 << 20, is_warm=is_warm, cold_reason=reason
    )


class FakeAgent:
    """Implements ``Agent``."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.orders: list[ReplicaOrder] = []
        self.prefetched: list[str] = []
        self.replicas: dict[str, ReplicaReport] = {}
        self.printed: dict[str, bytes] = {}
        self.num_streams = 0
        self.is_closed = False
        self._changed: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_slots(self) -> int:
        return 1

    async def start(self) -> None: ...

    async def close(self) -> None:
        for replica_id in self.replicas:
            self.change(replica_id, state="stopped", reason="stop asked")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.is_closed = True

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        self.orders.append(order)
        name = Path(order.model).name
        if name == "refused":
            raise OrderRefused(order.model, "no slot is free", "stop a replica, or wait for one (`run --wait`)")
        if name == "unsaid":
            raise RuntimeError("a mistake")
        replica_id = order.id or f"{name}-{len(self.orders):04x}"
        self.replicas[replica_id] = ReplicaReport(
            id=replica_id,
            model=order.model,
            state="waiting",
            reason="no slot is free" if name == "waits" else "",
            slots=(),
            pid=None,
            status=None,
            port=None if name == "on-socket" else 40123,
            url="unix:///node/sockets/1" if name == "on-socket" else "http://127.0.0.1:40123",
            api_key=KEY,
            age_s=1.0,
            in_state_s=0.5,
            start=None,
            log=str(self.config.log_dir / replica_id),
        )
        self.printed[replica_id] = b""
        self._changed[replica_id] = asyncio.Event()
        task = asyncio.create_task(self._live(replica_id, name))
        self._tasks.add(task)
        return self.replicas[replica_id]

    async def _live(self, replica_id: str, name: str) -> None:
        if name == "waits":
            return
        loading = start_report("loading weights", is_warm=name != "cold")
        self.change(replica_id, state="loading", slots=(0,), pid=os.getpid(), start=loading)
        for number in range(3):
            self.say(replica_id, f"line {number}\n".encode())
            await asyncio.sleep(0)
        if name == "dies":
            os._exit(9)
        if name == "fails":
            tail = ("line 1", "ValueError: no such model")
            ended = {"state": "failed", "slots": (), "status": 1, "reason": "it ended by itself"}
            self.change(replica_id, **ended, tail=tail, cause="ModuleNotFoundError: No module named 'torchvision'")
        elif name != "slow":
            done = start_report("ready", total_s=1.02, is_warm=name != "cold")
            self.change(replica_id, state="ready", start=done)

    def change(self, replica_id: str, **changes: object) -> None:
        """Something happened to it."""
        if not self.replicas[replica_id].has_ended:
            self.replicas[replica_id] = self.replicas[replica_id].model_copy(update=changes)
        changed, self._changed[replica_id] = self._changed[replica_id], asyncio.Event()
        changed.set()

    def say(self, replica_id: str, data: bytes) -> None:
        """It prints."""
        self.printed[replica_id] += data
        self.change(replica_id)

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        self.change(replica_id, state="stopping", reason="stop asked")
        report = self.replica(replica_id)
        self.change(replica_id, state="stopped")
        return report

    def replica(self, replica_id: str) -> ReplicaReport:
        if replica_id not in self.replicas:
            raise ReplicaUnknown(replica_id, "no replica has this id", "see `sllm-vllm ps --all`")
        return self.replicas[replica_id]

    def find(self, prefix: str) -> str:
        found = [name for name in self.replicas if name.startswith(prefix)]
        if len(found) != 1:
            raise ReplicaUnknown(prefix, f"{len(found)} replicas have ids with this prefix", "give more of the id")
        return found[0]

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[None]:
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        with self._streaming():
            while True:
                changed, report = self._changed[replica_id], self.replica(replica_id)
                yield report
                if report.has_ended:
                    return
                await changed.wait()

    async def logs(self, replica_id: str, *, tail_nbytes: int | None, follow: bool) -> AsyncIterator[bytes]:
        with self._streaming():
            told = 0 if tail_nbytes is None else max(0, len(self.printed[replica_id]) - tail_nbytes)
            while True:
                changed = self._changed[replica_id]
                if data := self.printed[replica_id][told:]:
                    yield data
                    told += len(data)
                elif not follow or self.replica(replica_id).has_ended:
                    return
                else:
                    await changed.wait()

    def story(self, replica_id: str) -> list[str]:
        return [f"-1.000 s  ReplicaOrdered {replica_id}", "-0.500 s  StartEngine"]

    async def prefetch(self, checkpoint: str) -> None:
        if checkpoint == "no-store":
            raise StoreUnavailable("/store/socket", "no daemon of the store", "start `sllm-vllm store serve`")
        self.prefetched.append(checkpoint)

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        done = start_report("ready", total_s=1.02)
        return NodeReport(
            version="1.2.3",
            pid=os.getpid(),
            uptime_s=7200.0,
            platform="cpu",
            slots=(SlotReport(slot=0, what="cpu 0-3, 10.5 GiB", replica=next(iter(self.replicas), None)),),
            replicas=tuple(self.replicas.values()),
            warm=WarmReport(pid=99, problem="", num_forks=3, import_s=9.5, pss_nbytes=5 << 20 if with_memory else None),
            checkpoints=(
                CheckpointReport(name="ckpt", nbytes=1 << 30, resident_nbytes=1 << 29, tiers=("HOST", "DISK")),
            ),
            hops={"disk": {"bps": 2e9, "limit_bps": 3e9}},
            store="",
            timings=(EngineTiming(replica="old-1", model="m", ended_unix_s=1e9, start=done),),
        )


class ServedAgent:
    """A fake agent behind the real socket, in a thread of this process."""

    def __init__(self, node_dir: Path) -> None:
        self.config = NodeConfig(node_dir=node_dir)
        self.agent = FakeAgent(self.config)
        self.was_told_to_stop = threading.Event()
        self._running = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @property
    def socket(self) -> Path:
        return self.config.socket_path

    @property
    def client(self) -> NodeClient:
        return NodeClient(self.socket, timeout_s=ANSWER_MAX_S)

    def order(self, model: str, **fields: object) -> ReplicaReport:
        return self.client.order(ReplicaOrder.model_validate({"model": model, **fields}))

    def do(self, act: Callable[[], T]) -> T:
        """Call it on the agent's loop."""

        async def acting() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(ANSWER_MAX_S)

    async def _serve(self) -> None:
        agent: Agent = self.agent
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = AgentServer(agent, stop=self.was_told_to_stop.set)
        await server.start()
        with listening(self.socket, WORDS) as listener:
            accepting = asyncio.create_task(server.serve(listener))
            self._running.set()
            await self._stopped.wait()
            accepting.cancel()
            await agent.close()
            await server.close()

    def __enter__(self) -> ServedAgent:
        make_private_directory(self.config.node_dir, WORDS)
        self._thread.start()
        assert self._running.wait(ANSWER_MAX_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()


def agent_command(node_dir: Path) -> list[str]:
    """Runs a fake agent as a program."""
    return [sys.executable, __file__, str(node_dir)]


@contextlib.contextmanager
def agent_process(node_dir: Path) -> Iterator[tuple[NodeClient, subprocess.Popen[bytes]]]:
    """A fake agent in a process of its own, for the whole of `daemon.serve`."""
    from tests.support.waiting import wait_until  # as a program, it does not find the tests

    client = NodeClient(node_dir / "socket", timeout_s=ANSWER_MAX_S)
    process = subprocess.Popen(agent_command(node_dir), stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: client.is_there() or process.poll() is not None, "the agent to answer")
        yield client, process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(serve(NodeConfig(node_dir=Path(sys.argv[1])), FakeAgent))
