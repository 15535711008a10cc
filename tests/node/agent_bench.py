"""A real agent on the test's loop; its engines are processes of ``fake_engine.py``, its clock jumps when told."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sllm_vllm.config import NodeConfig
from sllm_vllm.node import agent as agent_module
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.engine import http_base, session_to
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport
from sllm_vllm.units import GIB
from tests.support.waiting import DEADLINE_S, wait_until

FAKE_ENGINE = Path(__file__).resolve().parents[1] / "support" / "fake_engine.py"
TICK_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36


def node_config(directory: Path, **settings: Any) -> NodeConfig:
    """Two slots on the CPU, no store, fake engines; ``settings`` replace and add."""
    fixed: dict[str, Any] = {
        "node_dir": directory / "node",
        "store_dir": directory / "store",
        "slots": 2,
        "gpus": (),
        "memory_bytes": GIB,
        "engine_command": (sys.executable, str(FAKE_ENGINE), "serve"),
    }
    return NodeConfig(**fixed | settings)


class Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(self.format(record))


class Clock:
    """Goes on by itself, and by ``step_s`` at each look; ``ahead_s`` may be set."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.step_s = 0.0
        self.num_looks = 0

    def __call__(self) -> float:
        self.num_looks += 1
        self.ahead_s += self.step_s
        return time.monotonic() + self.ahead_s


class Bench:
    """An agent that runs, and what its tests say again and again."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.clock = Clock()
        self.agent = NodeAgent(config, clock=self.clock)
        self.pids: set[int] = set()
        """Of all engines that were seen."""

    async def order(self, name: str = "fine", **fields: Any) -> ReplicaReport:
        return await self.agent.ensure_replica(ReplicaOrder(model=f"/models/{name}", **fields))

    async def reach(self, replica_id: str, *states: str) -> ReplicaReport:
        """Wait for one of these states; any other end is a failure."""
        async with asyncio.timeout(DEADLINE_S):
            async for report in self.agent.watch(replica_id):
                self.pids.update([report.pid] if report.pid is not None else [])
                if report.state in states:
                    return report
                assert not report.has_ended, report
        raise AssertionError(f"{replica_id} was forgotten before it was {states}")

    async def ready(self, name: str = "fine", **fields: Any) -> ReplicaReport:
        return await self.reach((await self.order(name, **fields)).id, "ready")

    async def stop(self, replica_id: str) -> ReplicaReport:
        await self.agent.stop_replica(replica_id)
        return await self.reach(replica_id, "stopped", "failed")

    async def ticks(self, num: int = 3) -> None:
        """Wait until the agent has looked at its clock so often."""
        target = self.clock.num_looks + num
        await until(lambda: self.clock.num_looks >= target, f"{num} ticks")

    def left(self) -> list[int]:
        """What still runs of all engines that were seen."""
        return [member for pid in self.pids for member in living_members(pid)]


async def until(is_so: Callable[[], object], what: str) -> None:
    """``wait_until``, while the loop goes on."""
    await asyncio.to_thread(wait_until, is_so, what)


async def ask(report: ReplicaReport, path: str, *, with_key: bool = True, post: bool = False) -> tuple[int, Any]:
    """Status and answer of an engine."""
    headers = {"Authorization": f"Bearer {report.api_key}"} if with_key else {}
    method = "POST" if post else "GET"
    assert report.url is not None
    url, limit = f"{http_base(report.url)}{path}", aiohttp.ClientTimeout(total=DEADLINE_S)
    async with (
        session_to(report.url) as session,
        session.request(method, url, headers=headers, timeout=limit) as answer,
    ):
        text = await answer.text()
        return answer.status, await answer.json() if text else None


@contextlib.asynccontextmanager
async def running_agent(directory: Path, **settings: Any) -> AsyncIterator[Bench]:
    """An agent that ticks ten times a second; at the end nothing has gone wrong, and nothing of its engines is left."""
    bench = Bench(node_config(directory, **settings))
    with pytest.MonkeyPatch.context() as patch, errors() as told:
        patch.setattr(agent_module, "_TICK_S", TICK_S)
        await bench.agent.start()
        try:
            yield bench
            bench.agent._core.validate()
        finally:
            await bench.agent.close()
            adopt_no_more()
    assert bench.left() == []
    assert told == []


@contextlib.contextmanager
def errors() -> Iterator[list[str]]:
    """What is told as an error meanwhile: a task or a callback that failed, which nobody may see otherwise."""
    handler = Errors()
    loggers = [logging.getLogger(name) for name in ("asyncio", "sllm_vllm")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.told
    for logger in loggers:
        logger.removeHandler(handler)


def adopt_no_more() -> None:
    """An agent has made this process the parent of all orphans below it; it must not stay so."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)


def text_of(log: str) -> str:
    """What is in a log's two files, the older one first; empty where there is none."""
    return "".join(path.read_text() for path in (Path(f"{log}.1"), Path(log)) if path.exists())


def descriptors() -> set[str]:
    """What this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found
