"""Servers forked from a warm parent: stock vLLM's tokens, children of the agent, alive when the parent dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from sllm_vllm.config import child_environment
from sllm_vllm.node.engine_process import EngineProcess
from sllm_vllm.node.logs import BoundedLog, OutputPipe
from sllm_vllm.node.warm_order import WarmOrder
from sllm_vllm.node.warm_pool import NotWarm, WarmPool
from tests.conftest import ModelDir
from tests.support.vllm_server import SERVER_ENVIRONMENT, Server, vllm_server
from tests.support.waiting import DEADLINE_S, wait_until

pytestmark = pytest.mark.e2e_long

PROMPTS = ("hello world", "a b c d e f g")
WARM_MAX_S = 400.0
_PR_SET_CHILD_SUBREAPER = 36
ENVIRONMENT = {**SERVER_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false"}


def answers(server: Server) -> list[list[int]]:
    return [server.tokens(prompt, temperature=0) for prompt in PROMPTS]


@dataclass(slots=True)
class Bench:
    """A warm pool, and servers from it. This process is the agent."""

    pool: WarmPool
    directory: Path

    async def serve(self, model: Path) -> tuple[EngineProcess, Server]:
        port = free_port()
        log = BoundedLog(self.directory / f"engine-{port}.log", 1 << 20)
        pipe = OutputPipe(log, lambda line: None)
        arguments = (
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enforce-eager",
            "--max-model-len",
            "256",
        )
        order = WarmOrder(
            number=1,
            arguments=arguments,
            environment=child_environment(**ENVIRONMENT),
            directory=str(self.directory),
            num_threads=1,
        )
        engine = await self.pool.fork(order, pipe.writer)
        pipe.close_writer()
        async with asyncio.timeout(WARM_MAX_S):
            while not await asyncio.to_thread(is_healthy, port):
                assert engine.status is None, log.path.read_text()
        return engine, Server(port, str(model), log.path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_healthy(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        return True
    return False


def processes_of(group: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
            pid = int(entry.name)
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getpgid(pid) == group and state != "Z":
                found.append(pid)
    return found


def is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    return not processes_of(group)


def parent_of(pid: int) -> int:
    """A process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    pool = WarmPool(child_environment(**ENVIRONMENT), tmp_path / "warm.log")
    try:
        assert await pool.wait_warm(WARM_MAX_S), (tmp_path / "warm.log").read_text()
        yield Bench(pool, tmp_path)
    finally:
        await pool.close()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)


async def test_a_forked_server_answers_like_stock_and_outlives_its_parent(
    bench: Bench, model_dir: ModelDir, tmp_path: Path
) -> None:
    model = model_dir("llama")
    engine, warm = await bench.serve(model)
    found = await asyncio.to_thread(answers, warm)
    assert parent_of(engine.pid) == os.getpid()  # adopted

    first = bench.pool.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: bench.pool.pid not in (first, None), "another warm parent")
    assert await asyncio.to_thread(answers, warm) == found

    second_engine, second = await bench.serve(model_dir("opt"))
    assert await asyncio.to_thread(answers, second)
    for process in (engine, second_engine):
        process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
        await asyncio.to_thread(wait_until, partial(is_gone, process.pid), "all of its group to be gone")
    with vllm_server(model, tmp_path) as stock:
        assert answers(stock) == found


async def test_a_bad_argument_ends_with_vllms_own_message(bench: Bench, tmp_path: Path) -> None:
    lines: list[str] = []
    pipe = OutputPipe(BoundedLog(tmp_path / "engine.log", 1 << 20), lines.append)
    order = WarmOrder(
        number=1,
        arguments=("model", "--no-such-argument"),
        environment=child_environment(**ENVIRONMENT),
        directory=str(tmp_path),
        num_threads=1,
    )
    engine = await bench.pool.fork(order, pipe.writer)
    pipe.close_writer()
    async with asyncio.timeout(DEADLINE_S):
        assert await engine.wait() == 2
        await pipe.wait_closed()
    assert any("--no-such-argument" in line for line in lines)


async def test_an_installation_that_changed_is_not_forked_from(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllm_vllm.node.warm_pool.installation", lambda: "another one")
    order = WarmOrder(number=1, arguments=("m",), environment={}, directory=str(tmp_path), num_threads=1)
    with (tmp_path / "out").open("wb") as output, pytest.raises(NotWarm, match="installed anew"):
        await bench.pool.fork(order, output.fileno())
