"""The agent's hold on its warm parent, with parents that are none."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_vllm.node import warm_pool
from sllm_vllm.node.warm_order import WarmOrder, installation
from sllm_vllm.node.warm_pool import NotWarm, WarmPool
from tests.node.agent_bench import until
from tests.support.waiting import DEADLINE_S


def parent() -> Any:
    """One that dies at once."""

    async def wait() -> int:
        return -9

    ready = SimpleNamespace(pid=1, seconds=1.0)
    return SimpleNamespace(ready=ready, process=SimpleNamespace(wait=wait), has_died=False, close=lambda: None)


async def pauses_of(num: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Before each of the first parents after the first one."""
    loop, started_s, done = asyncio.get_running_loop(), list[float](), asyncio.Event()

    async def start(pool: WarmPool) -> Any:
        started_s.append(loop.time())
        if len(started_s) > num:
            done.set()
            await asyncio.Event().wait()
        return parent()

    monkeypatch.setattr(WarmPool, "_start", start)
    pool = WarmPool({}, tmp_path / "log")
    async with asyncio.timeout(DEADLINE_S):
        await done.wait()
    await pool.close()
    return [after - before for before, after in itertools.pairwise(started_s)]


async def test_a_parent_that_dies_young_again_and_again_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_pool, "RESTART_PAUSE_S", 0.1)
    pauses_s = await pauses_of(4, monkeypatch, tmp_path)
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.1, 0.2, 0.4, 0.8), strict=True))


async def test_a_parent_that_has_lived_for_a_while_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_pool, "STEADY_S", -1.0)
    monkeypatch.setattr(warm_pool, "RESTART_PAUSE_S", 600.0)
    assert len(await pauses_of(4, monkeypatch, tmp_path)) == 4


async def test_an_error_that_was_not_foreseen_does_not_end_the_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_pool, "RESTART_PAUSE_S", 0.01)
    tries, again = list[int](), asyncio.Event()

    async def start(pool: WarmPool) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("can't start new thread")
        again.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(WarmPool, "_start", start)
    pool = WarmPool({}, tmp_path / "log")
    async with asyncio.timeout(DEADLINE_S):
        await again.wait()
    await pool.close()


@pytest.mark.parametrize(
    ("keeps_channel", "told"), [(True, "it has not imported vLLM within 1 s"), (False, "it ended with status -9")]
)
async def test_a_parent_that_never_gets_ready_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_channel: bool, told: str
) -> None:
    """The message of a TimeoutError is empty; one that has closed its end of the channel may run on."""
    monkeypatch.setattr(warm_pool, "RESTART_PAUSE_S", 600.0)
    monkeypatch.setattr(warm_pool, "READY_MAX_S", 1.0)

    def spawn(pool: WarmPool, channel: int, log: int) -> int:
        return subprocess.Popen(["sleep", "600"], pass_fds=[channel] if keeps_channel else []).pid

    monkeypatch.setattr(WarmPool, "_spawn", spawn)
    pool = WarmPool({}, tmp_path / "log")
    await until(lambda: "does not start" in pool.problem, "the attempt to fail")
    problem = pool.problem
    await pool.close()
    assert problem.startswith(f"the warm parent does not start ({told}), see ")


async def test_a_parent_whose_end_is_seen_twice_is_replaced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its process's end, and by the fork that it does not answer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    died, imports, imported = asyncio.Event(), asyncio.Queue[int](), asyncio.Event()

    def parent_of(pid: int, ended: asyncio.Event) -> Any:
        ready = SimpleNamespace(pid=pid, seconds=1.0, installation=installation())
        return SimpleNamespace(
            ready=ready, process=SimpleNamespace(wait=ended.wait), channel=ours, num_forks=0, has_died=False, close=str
        )

    async def start(pool: WarmPool) -> Any:
        imports.put_nowait(1)
        if pool.pid is None and not died.is_set():
            return parent_of(1, died)
        await imported.wait()
        return parent_of(2, asyncio.Event())

    monkeypatch.setattr(WarmPool, "_start", start)
    monkeypatch.setattr(warm_pool, "RESTART_PAUSE_S", 0.01)
    pool = WarmPool({}, tmp_path / "log")
    async with asyncio.timeout(DEADLINE_S):
        assert await pool.wait_warm(60)
        await imports.get()
        order = WarmOrder(number=0, arguments=(), environment={}, directory="/", num_threads=1)
        with theirs, ours:
            fork = asyncio.create_task(pool.fork(order, theirs.fileno()))
            await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
            died.set()
            await imports.get()
            theirs.close()
            with pytest.raises(NotWarm):
                await fork
        imported.set()
        assert await pool.wait_warm(60)
        for _ in range(20):
            await asyncio.sleep(0)
    assert (pool.pid, imports.qsize()) == (2, 0)
    await pool.close()
