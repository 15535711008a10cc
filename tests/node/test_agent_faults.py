"""Engines that fail, hang, fall ill, freeze, are killed or will not end: the agent notices, and has its slots back."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.orphans import find_process
from sllm_vllm.node.protocol import ReplicaReport
from tests.node.agent_bench import Bench, adopt_no_more, ask, descriptors, node_config, running_agent, until
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S

EAGER_S = 0.25
"""Between two health questions, where a test waits for several."""
ILL = "it answered with status 503"
SILENT = f"no answer within {EAGER_S} s"
"""Also what an ill one says on a busy machine."""


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Path]:
    """The file that ``late`` engines wait for; made at the end, whatever happened."""
    path = tmp_path / "go"
    yield path
    path.touch()


async def free_slots(bench: Bench) -> int:
    return sum(slot.replica is None for slot in (await bench.agent.report()).slots)


def children() -> set[int]:
    """Of this process, without the threads."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def end(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def has_failed(report: ReplicaReport) -> bool:
    return report.state == "failed" and not report.slots and report.pid is None


# ----------------------------------------------------------------------------------------------------------- starting


async def test_one_that_ends_before_it_is_healthy_has_failed_and_says_why(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.reach((await bench.order("exits-3")).id, "failed")
        assert has_failed(report)
        assert (report.status, report.reason) == (3, "exited with status 3 before it was healthy")
        assert report.tail[-1].endswith("RuntimeError: Engine core initialization failed")
        assert report.start is not None
        assert report.start.phase != "ready"
        assert await free_slots(bench) == 2
        assert (await bench.agent.report()).timings == ()


async def test_one_that_ends_with_an_exception_says_so_whatever_it_printed_last(tmp_path: Path) -> None:
    program = "import atexit\natexit.register(print, 'bye')\nraise ModuleNotFoundError('torchvision')"
    async with running_agent(tmp_path, engine_command=(sys.executable, "-c", program)) as bench:
        report = await bench.reach((await bench.order()).id, "failed")
        assert (report.status, report.cause, report.tail[-1]) == (1, "ModuleNotFoundError: torchvision", "bye")


async def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    async with running_agent(tmp_path, engine_command=(str(tmp_path / "no-such-program"),)) as bench:
        report = await bench.reach((await bench.order()).id, "failed")
        assert has_failed(report)
        assert report.tail == (f"{tmp_path}/no-such-program: No such file or directory",)
        assert await free_slots(bench) == 2


@every_case(
    "order",
    [
        {"arguments": ("a\0b",)},
        {"environment": {"A=B": "C"}},
        {"environment": {"A": "B\0"}},
        {"arguments": ("x" * (1 << 20),)},
    ],
)
async def test_words_that_no_process_can_be_given_are_told(tmp_path: Path, order: dict[str, Any]) -> None:
    """Such an order kept its slots for ever."""
    before = descriptors()
    async with running_agent(tmp_path) as bench:
        report = await bench.reach((await bench.order(**order)).id, "failed")
        assert has_failed(report)
        assert report.reason.startswith("no process: ")
        assert await free_slots(bench) == 2
    assert descriptors() == before


async def test_a_process_that_cannot_be_watched_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its slots taken away, and ran on."""

    def none_left(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with running_agent(tmp_path) as bench:
        before = children()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", none_left)
            report = await bench.reach((await bench.order()).id, "failed")
        try:
            assert report.reason == "no process: Too many open files"
            assert await free_slots(bench) == 2
            assert children() == before
        finally:
            end(children() - before)


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.reach((await bench.order(directory="/no/such/folder")).id, "failed")
        assert has_failed(report)
        assert "/no/such/folder: No such file or directory" in report.tail


async def test_one_that_hangs_while_it_starts_is_ended(tmp_path: Path) -> None:
    async with running_agent(tmp_path, start_s=20) as bench:
        hanging = await bench.reach((await bench.order("hangs")).id, "loading")
        await bench.ticks()
        assert bench.agent.replica(hanging.id).state == "loading"
        bench.clock.step_s = 5
        report = await bench.reach(hanging.id, "failed")
        assert (report.status, report.reason) == (-signal.SIGKILL, "not healthy within 20 s")
        assert await free_slots(bench) == 2


async def test_more_slots_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0, GPU-1, 1000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = descriptors()
    agent = NodeAgent(node_config(tmp_path, gpus=None))
    with pytest.raises(ConfigError, match="2 slots are configured, but there are 1 GPUs"):
        await agent.start()
    adopt_no_more()
    assert descriptors() == before


# ------------------------------------------------------------------------------------------------------------ running


async def test_one_that_turns_ill_is_unwell_until_it_is_well(tmp_path: Path) -> None:
    async with running_agent(tmp_path, health_s=EAGER_S, unwell_max=1000) as bench:
        report = await bench.ready("turns-ill")
        await ask(report, "/ill", post=True)
        assert (await bench.reach(report.id, "unwell")).reason in {ILL, SILENT}
        await ask(report, "/well", post=True)
        well = await bench.reach(report.id, "ready")
        assert (well.pid, well.reason) == (report.pid, "")
        assert len((await bench.agent.report()).timings) == 1  # it was started once


@every_case("takes_socket", [False, True])
@every_case(
    "name, path, lasts",
    [("turns-ill", "/ill", {ILL, SILENT}), ("freezes", "/freeze", {SILENT})],
)
async def test_one_that_is_ill_or_frozen_for_long_is_ended(
    tmp_path: Path, name: str, path: str, lasts: set[str], takes_socket: bool
) -> None:
    async with running_agent(tmp_path, health_s=EAGER_S, unwell_max=3, engine_sockets=True) as bench:
        report = await bench.ready(name, takes_socket=takes_socket)
        await ask(report, path, post=True)
        ended = await bench.reach(report.id, "failed")
        told, _, last = ended.reason.partition(", the last one: ")
        assert told == "hung: 3 health answers missed in a row"
        assert last in lasts
        assert ended.status == -signal.SIGKILL
        assert has_failed(ended)
        assert await free_slots(bench) == 2


async def test_one_that_is_stopped_by_a_signal_is_ended(tmp_path: Path) -> None:
    async with running_agent(tmp_path, health_s=EAGER_S, unwell_max=2) as bench:
        report = await bench.ready()
        assert report.pid is not None
        os.kill(report.pid, signal.SIGSTOP)
        assert (await bench.reach(report.id, "failed")).reason.startswith("hung: 2 health answers")


async def test_of_one_that_is_killed_nothing_is_left(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready("family")
        assert report.pid is not None
        family = living_members(report.pid)
        assert len(family) == 3
        os.kill(report.pid, signal.SIGKILL)
        ended = await bench.reach(report.id, "failed")
        assert (ended.status, ended.reason) == (-signal.SIGKILL, "ended by signal 9")
        assert has_failed(ended)
        assert living_members(report.pid) == []
        assert await free_slots(bench) == 2
        assert any(line.startswith("child ") for line in ended.tail)
        await until(lambda: not any(map(find_process, family)), "the children that were adopted to be reaped")


async def test_a_child_that_is_killed_is_the_engines_business(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as bench:
        report = await bench.ready("family")
        assert report.pid is not None
        child = max(living_members(report.pid))
        os.kill(child, signal.SIGKILL)
        await until(lambda: child not in living_members(report.pid or 0), "the child to end")
        await bench.ticks()
        assert bench.agent.replica(report.id).state == "ready"


async def test_one_that_will_not_end_is_killed(tmp_path: Path) -> None:
    async with running_agent(tmp_path, stop_s=6) as bench:
        report = await bench.ready("ignores-term")
        await bench.agent.stop_replica(report.id)
        await bench.ticks()
        assert bench.agent.replica(report.id).state == "stopping"
        assert (await ask(report, "/v1/models"))[0] == 200
        assert await free_slots(bench) == 1
        bench.clock.step_s = 5
        ended = await bench.reach(report.id, "stopped")
        assert (ended.status, ended.reason) == (-signal.SIGKILL, "stop asked")
        assert await free_slots(bench) == 2


async def test_a_clock_that_jumps_ends_nobody(tmp_path: Path, go: Path) -> None:
    async with running_agent(tmp_path, start_s=DEADLINE_S + 30) as bench:
        ready = await bench.ready()
        starting = await bench.order("late", environment={"FAKE_ENGINE_GO": str(go)})
        await bench.reach(starting.id, "loading")
        for jump_s in (3600, -7200, 3600):
            bench.clock.ahead_s += jump_s
            await bench.ticks()
            states = [bench.agent.replica(report.id).state for report in (ready, starting)]
            assert states == ["ready", "loading"]
            assert bench.agent.replica(ready.id).in_state_s >= 0
        go.open("w").close()
        assert (await bench.reach(starting.id, "ready")).state == "ready"
        assert bench.agent.replica(ready.id).pid == ready.pid
