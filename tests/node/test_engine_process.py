"""Engines as processes: how they ended, that all of them ended, and that none outlives the agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from sllm_vllm.config import child_environment
from sllm_vllm.node.cold_start import serve_command
from sllm_vllm.node.engine_process import EngineProcess, start_cold
from sllm_vllm.node.logs import BoundedLog, OutputPipe
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S, wait_until

_SLEEPER = (
    "import subprocess, sys, time; subprocess.Popen(['sleep', '1000']); print('up', flush=True); time.sleep(1000)"
)
_AGENT = """
import asyncio, os, sys
from sllm_vllm.config import child_environment
from sllm_vllm.node.cold_start import serve_command
from sllm_vllm.node.engine_process import start_cold

async def main():
    null = os.open(os.devnull, os.O_WRONLY)
    print(start_cold([*serve_command(), "model"], child_environment(), null).pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def spawn(script: str, output: int) -> EngineProcess:
    command = [sys.executable, "-c", script]
    actions = [(os.POSIX_SPAWN_DUP2, output, 1)]
    return EngineProcess(os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@every_case("script, status", [("", 0), ("raise SystemExit(3)", 3), ("import os; os.abort()", -6)])
async def test_the_status_tells_how_it_ended(script: str, status: int) -> None:
    process = spawn(script, 2)
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == status
    assert process.status == status
    process.kill()  # too late: harmless


@every_case("how", ["terminate", "kill"])
async def test_nothing_of_its_group_is_left(how: str) -> None:
    reading, writing = os.pipe()
    process = spawn(_SLEEPER, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert await asyncio.to_thread(pipe.readline) == b"up\n"
        getattr(process, how)()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == (-signal.SIGTERM if how == "terminate" else -signal.SIGKILL)
            assert await asyncio.to_thread(pipe.read) == b""  # nobody has the other end any more


async def test_a_cold_start_ends_with_vllms_own_message(tmp_path: Path) -> None:
    lines: list[str] = []
    pipe = OutputPipe(BoundedLog(tmp_path / "log", 1 << 20), lines.append)
    process = start_cold([*serve_command(), "--no-such-argument"], child_environment(), pipe.writer)
    pipe.close_writer()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 2
        await pipe.wait_closed()
    assert any("--no-such-argument" in line for line in lines)


def test_an_engine_does_not_outlive_its_agent() -> None:
    agent = subprocess.Popen([sys.executable, "-c", _AGENT], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    engine = int(agent.stdout.readline())
    assert is_alive(engine)
    agent.kill()
    agent.wait()
    wait_until(lambda: not is_alive(engine), "the engine to end with its agent")


async def test_an_engine_inherits_no_descriptor_that_a_library_left_inheritable(tmp_path: Path) -> None:
    """It listened on the same ports as Ray did in its agent's process."""
    pipe = OutputPipe(BoundedLog(tmp_path / "log", 1 << 20), list[str]().append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        process = start_cold(command, child_environment(), pipe.writer)
        pipe.close_writer()
        held = Path(f"/proc/{process.pid}/fd")
        own = {"0", "1", "2"}
        await asyncio.to_thread(wait_until, lambda: set(os.listdir(held)) == own, "the engine to hold its own alone")
        process.kill()
        async with asyncio.timeout(DEADLINE_S):
            await process.wait()
            await pipe.wait_closed()
