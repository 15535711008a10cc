"""Loops that survive, and daemons that end with a reason when one can't."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sllm_vllm.daemon import run_loops
from sllm_vllm.daemon.run_loops import FAILURES_MAX, RunLoops
from tests.support.fake_gate import until
from tests.support.waiting import DEADLINE_S, wait_until


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses worth the name."""
    for name in ("PAUSE_S", "PAUSE_S_MAX", "SHORTAGE_PAUSE_S_MAX"):
        monkeypatch.setattr(run_loops, name, 0.001)


def failing(num: int, error: Exception) -> tuple[Callable[[], Awaitable[None]], asyncio.Event]:
    """A step that fails so often, and then waits."""
    left, is_well = [error] * num, asyncio.Event()

    async def step() -> None:
        if left:
            raise left.pop()
        is_well.set()
        await asyncio.sleep(0.01)

    return step, is_well


async def test_a_step_that_fails_is_tried_again_and_the_problem_is_told_meanwhile() -> None:
    loops, told = RunLoops(), []
    step, is_well = failing(3, ValueError("no"))

    async def watched() -> None:
        try:
            await step()
        finally:
            told.append(loops.problem)

    loops.start("a loop", watched)
    await asyncio.wait_for(is_well.wait(), DEADLINE_S)
    await until(lambda: not loops.problem, "it to work")
    assert told[:3] == ["", "a loop: ValueError: no", "a loop: ValueError: no"]


async def test_a_shortage_ends_nothing_however_long_it_lasts() -> None:
    given_up: list[str] = []
    step, is_well = failing(10 * FAILURES_MAX, OSError(errno.EMFILE, "Too many open files"))
    RunLoops(given_up.append).start("a loop", step)
    await asyncio.wait_for(is_well.wait(), DEADLINE_S)
    assert given_up == []


async def test_what_fails_again_and_again_ends_with_the_reason_and_stays_a_problem() -> None:
    given_up: list[str] = []
    step, _ = failing(FAILURES_MAX, KeyError("x"))
    loops = RunLoops(given_up.append)
    await asyncio.wait_for(loops.start("a loop", step), DEADLINE_S)
    assert given_up == [f"a loop failed {FAILURES_MAX} times, the last time with KeyError: 'x'"]
    assert loops.problem == "a loop: KeyError: 'x'"


async def test_a_loop_outlives_the_cancellation_of_what_it_waits_for() -> None:
    inner, is_well = asyncio.get_running_loop().create_task(asyncio.sleep(60)), asyncio.Event()

    async def step() -> None:
        if not inner.done():
            inner.cancel()
            await inner
        is_well.set()
        await asyncio.sleep(0.01)

    RunLoops().start("a loop", step)
    await asyncio.wait_for(is_well.wait(), DEADLINE_S)


async def test_one_that_is_cancelled_ends_and_is_no_problem() -> None:
    loops = RunLoops()
    task = loops.start("a loop", failing(10**6, OSError(errno.EMFILE, ""))[0])
    await until(lambda: loops.problem, "it to fail")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert loops.problem == ""


# -------------------------------------------------------------------------------------------------------------- daemons

_BROKEN = """
import sys
from pathlib import Path
from sllm_vllm.daemon import run_loops
run_loops.PAUSE_S = run_loops.PAUSE_S_MAX = 0.01

async def broken(self, *_):
    raise ZeroDivisionError("it is broken")

kind, directory = sys.argv[1], Path(sys.argv[2])
if kind == "store":
    from sllm_vllm.store import daemon
    from sllm_vllm.config import StoreConfig
    daemon.StoreServer.accept = broken
    start = lambda: daemon.serve(StoreConfig(store_dir=directory, memory_bytes=1 << 26))
elif kind == "node":
    from sllm_vllm.node import agent, daemon
    from sllm_vllm.config import NodeConfig
    agent.NodeAgent._tick = broken
    start = lambda: daemon.serve(NodeConfig(node_dir=directory, store_dir=directory, warm=False, slots=1))
else:
    from sllm_vllm.router import controller, daemon
    controller.Controller._tick = broken
    (directory / "router.yaml").write_text(
        "server: {port: 0}\\nnode: {node_dir: ./node, warm: false, slots: 1}\\nstore: {directory: ./store}"
    )
    start = lambda: daemon.serve(directory / "router.yaml")
sys.argv = ["sllm-vllm"]
from sllm_vllm.cli import main as cli
cli.app = start
cli.main()
"""


@pytest.mark.parametrize("kind", ["store", "node", "router"])
def test_a_daemon_whose_loop_is_broken_ends_with_a_status_and_the_reason(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", _BROKEN, kind, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("sllm-vllm: ended because ")
    assert last.endswith(f"failed {FAILURES_MAX} times, the last time with ZeroDivisionError: it is broken")


_STUCK = """
import asyncio, sys, time
from sllm_vllm.daemon.ending import Ending

async def main():
    ending = Ending(within_s=0.5)
    print("blocked", flush=True)
    time.sleep(600)

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sigterm_ends_a_process_whose_loop_is_blocked(loop: str) -> None:
    with subprocess.Popen([sys.executable, "-c", _STUCK, loop], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"blocked\n"
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, "its end")
    assert process.returncode == 1


_STARTING = """
import asyncio
from sllm_vllm.daemon.ending import Ending, Stopped

async def main():
    ending = Ending(within_s=60)
    try:
        with ending.starting():
            print("starts", flush=True)
            await asyncio.sleep(600)
    except Stopped:
        print("stopped", flush=True)
    ending.check()

asyncio.run(main())
"""


def test_sigterm_ends_a_daemon_that_still_starts() -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"starts\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == b"stopped\n"
    assert process.returncode == 0
