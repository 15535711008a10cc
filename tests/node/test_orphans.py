"""No engine outlives the agent, nobody else dies with it: the record, the sweep and the watch on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sllm_vllm.node import orphans
from sllm_vllm.node.hardware import pss_nbytes
from sllm_vllm.node.orphans import DeathWatch, Record, find_process, sweep
from tests.support.waiting import wait_until

WATCH_NBYTES_MAX = 20 * 10**6
_ENGINE = """
import subprocess, time
children = [
    subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, process_group=group) for group in (None, 0)
]
print(*[child.pid for child in children], flush=True)
time.sleep(1000)
"""
_AGENT = f"""
import subprocess, sys
from sllm_vllm.node.orphans import DeathWatch, Record
record, watch = Record(sys.argv[1]), DeathWatch(sys.argv[1])
watch.start()
engine = subprocess.Popen(
    [sys.executable, "-c", {_ENGINE!r}], start_new_session=True, stdout=subprocess.PIPE, text=True
)
record.add(engine.pid)
print(watch.pid, engine.pid, *engine.stdout.readline().split(), flush=True)
sys.stdin.readline()
watch.close()
print("closed", flush=True)
sys.stdin.readline()
"""

Start = Callable[[], "Engine"]


class Engine:
    """A process that leads a session, with two children, one in a group of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.pid = process.pid
        self.pids = [self.pid, *map(int, process.stdout.readline().split())]


class Agent:
    """A process that watches over one engine, and what it tells of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.watch, *self.engine = map(int, process.stdout.readline().split())


def is_alive(pid: int) -> bool:
    process = find_process(pid)
    return process is not None and not process.is_ended


def all_alive(pids: list[int]) -> bool:
    return all(is_alive(pid) for pid in pids)


def none_alive(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


@pytest.fixture
def record_path(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Engine] = []

    def start() -> Engine:
        command = [sys.executable, "-c", _ENGINE]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(Engine(process))
        return started[-1]

    yield start
    for engine in started:
        end(engine.pids)
        engine.process.communicate()


@pytest.fixture
def agent(record_path: Path) -> Iterator[Agent]:
    command = [sys.executable, "-c", _AGENT, str(record_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    agent = Agent(process)
    yield agent
    end([agent.watch, *agent.engine])
    process.kill()
    process.communicate()


@pytest.fixture
def watch(record_path: Path) -> Iterator[DeathWatch]:
    watch = DeathWatch(record_path)
    yield watch
    watch.close()


def end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def recorded(path: Path) -> dict[int, int]:
    _, *lines = path.read_text().splitlines()
    return {int(pid): int(start) for pid, start in map(str.split, lines)}


def test_a_record_holds_the_living_with_their_starts(record_path: Path, start: Start) -> None:
    one, other = start().pid, start().pid
    record = Record(record_path)
    assert not record_path.exists()
    assert sweep(record_path) == []
    record.add(one)
    record.add(other)
    found = {pid: process.start for pid in (one, other) if (process := find_process(pid))}
    assert recorded(record_path) == found
    record.remove(one)
    record.remove(one)
    assert list(recorded(record_path)) == [other]
    assert record_path.read_text().startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    assert stat.S_IMODE(record_path.stat().st_mode) == 0o600
    assert list(record_path.parent.iterdir()) == [record_path]


def test_who_is_not_there_is_not_recorded(record_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    Record(record_path).add(process.pid)
    assert not record_path.exists()
    assert "event=engine_not_recorded" in caplog.text


def test_a_write_that_fails_is_logged_and_made_up_for(
    record_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    engine = start()
    record = Record(record_path)
    record.add(engine.pid)
    before = record_path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_want_of_space)
        record.add(engine.pids[1])
    assert "event=record_not_written" in caplog.text
    assert record_path.read_text() == before
    assert list(record_path.parent.iterdir()) == [record_path]
    record.add(engine.pids[2])
    assert list(recorded(record_path)) == engine.pids


def fail_for_want_of_space(source: str, target: str) -> None:
    raise OSError(28, "No space left on device", source)


def test_a_link_is_not_followed_but_replaced(record_path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    record_path.with_name("record.new").symlink_to(victim)
    Record(record_path).add(os.getpid())
    assert victim.read_text() == "precious"
    assert record_path.read_text().splitlines()[1].startswith(f"{os.getpid()} ")


# ------------------------------------------------------------------------------------------------------------ sweep


@pytest.mark.parametrize("leader", ["alive", "stopped", "gone"])
def test_a_sweep_ends_a_session(record_path: Path, start: Start, leader: str) -> None:
    engine = start()
    Record(record_path).add(engine.pid)
    if leader == "stopped":
        os.kill(engine.pid, signal.SIGSTOP)
    if leader == "gone":
        engine.process.kill()
        engine.process.wait()
    left = engine.pids[leader == "gone" :]
    assert sorted(sweep(record_path)) == sorted(left)
    assert none_alive(engine.pids)
    assert sweep(record_path) == []


def test_a_sweep_leaves_who_is_not_recorded(record_path: Path, start: Start) -> None:
    engine, other = start(), start()
    record = Record(record_path)
    record.add(engine.pid)
    record.add(other.pid)
    record.remove(other.pid)
    sweep(record_path)
    assert none_alive(engine.pids)
    assert all_alive(other.pids)


def test_a_sweep_leaves_its_own_session(record_path: Path) -> None:
    child = subprocess.Popen(["sleep", "1000"], process_group=0)
    record = Record(record_path)
    for pid in (os.getpid(), os.getsid(0), os.getpgrp()):
        record.add(pid)
    record.add(child.pid)
    assert sweep(record_path) == []
    assert is_alive(child.pid)
    child.kill()
    child.wait()


def change_start(text: str) -> str:
    head, line, _ = text.split("\n")
    pid, start = line.split()
    return f"{head}\n{pid} {int(start) - 1}\n"


BROKEN = [
    pytest.param(lambda text: "0" * 8 + text[8:], id="another boot"),
    pytest.param(lambda text: text.replace("pid:[", "pid:[1"), id="another container"),
    pytest.param(change_start, id="the number is another process's now"),
    pytest.param(lambda text: text.rstrip("\n"), id="cut off"),
    pytest.param(lambda text: text + "what\n", id="a line that is none"),
    pytest.param(lambda text: text + "1 -1\n", id="impossible numbers"),
    pytest.param(lambda text: text + "\N{SNOWMAN}\n", id="not ASCII"),
    pytest.param(lambda text: text.partition("\n")[2], id="no first line"),
    pytest.param(lambda text: "", id="empty"),
]


@pytest.mark.parametrize("change", BROKEN)
def test_nobody_is_killed_by_a_record_that_is_not_right(
    record_path: Path, start: Start, change: Callable[[str], str]
) -> None:
    engine = start()
    Record(record_path).add(engine.pid)
    record_path.write_text(change(record_path.read_text()))
    assert sweep(record_path) == []
    assert all_alive(engine.pids)


def test_nobody_is_killed_who_is_older_than_the_engine(record_path: Path, start: Start) -> None:
    """Those of a session whose leader is gone, but was no engine: it had the number before."""
    engine = start()
    Record(record_path).add(engine.pid)
    engine.process.kill()
    engine.process.wait()
    head, line, _ = record_path.read_text().split("\n")
    record_path.write_text(f"{head}\n{engine.pid} {int(line.split()[1]) + 10**6}\n")
    assert sweep(record_path) == []
    assert all_alive(engine.pids[1:])


def test_a_linked_record_is_none(record_path: Path, start: Start, tmp_path: Path) -> None:
    engine = start()
    Record(tmp_path / "elsewhere").add(engine.pid)
    record_path.symlink_to(tmp_path / "elsewhere")
    assert sweep(record_path) == []
    assert all_alive(engine.pids)


# ------------------------------------------------------------------------------------------------------ death watch


@pytest.mark.parametrize("tried", [[], [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]])
def test_all_end_with_an_agent_that_is_killed(agent: Agent, tried: list[signal.Signals]) -> None:
    for number in tried:
        os.kill(agent.watch, number)
    assert all_alive([agent.watch, *agent.engine])
    agent.process.kill()
    wait_until(lambda: none_alive(agent.engine), "the engine to end with its agent")
    wait_until(lambda: not is_alive(agent.watch), "the watch to end with its agent")


def test_an_engine_outlives_an_agent_that_closes_its_watch(agent: Agent) -> None:
    agent.process.communicate("\n\n")
    assert agent.process.returncode == 0
    assert not is_alive(agent.watch)
    assert all_alive(agent.engine)


def test_the_next_agent_sweeps_if_the_watch_died_too(agent: Agent, record_path: Path) -> None:
    end([agent.watch, agent.process.pid])
    wait_until(lambda: none_alive([agent.watch, agent.process.pid]), "both to end")
    assert all_alive(agent.engine)
    assert sorted(sweep(record_path)) == sorted(agent.engine)
    assert none_alive(agent.engine)


def test_a_late_watch_leaves_the_next_agents_engines(agent: Agent, record_path: Path, start: Start) -> None:
    os.kill(agent.watch, signal.SIGSTOP)
    agent.process.kill()
    agent.process.wait()
    sweep(record_path)
    engine = start()
    Record(record_path).add(engine.pid)
    os.kill(agent.watch, signal.SIGCONT)
    wait_until(lambda: not is_alive(agent.watch), "the watch to end")
    assert all_alive(engine.pids)


def started(watch: DeathWatch) -> int:
    watch.start()
    assert watch.pid is not None
    return watch.pid


def test_a_watch_holds_its_pipe_and_little_else(watch: DeathWatch) -> None:
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        pid = started(watch)
    wait_until(lambda: os.readlink(f"/proc/{pid}/cwd") == "/", "the last that it does before it watches")
    (descriptor,) = Path(f"/proc/{pid}/fd").iterdir()
    assert descriptor.name == "0"
    assert os.readlink(descriptor).startswith("pipe:")
    process = find_process(pid)
    assert process is not None
    assert process.session == process.group == pid
    nbytes = pss_nbytes(pid)
    assert nbytes is not None
    assert 0 < nbytes < WATCH_NBYTES_MAX


def test_nobody_else_holds_the_agents_end(watch: DeathWatch) -> None:
    """Else the pipe would not end with the agent."""
    pid = started(watch)
    pipe = os.readlink(f"/proc/{pid}/fd/0")
    child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    with child:
        held = [os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()]
        child.kill()
    assert held
    assert pipe not in held


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_watch_that_died_is_replaced(watch: DeathWatch, caplog: pytest.LogCaptureFixture, is_reaped: bool) -> None:
    first = started(watch)
    assert watch.ensure()
    assert watch.pid == first
    os.kill(first, signal.SIGKILL)
    if is_reaped:
        os.waitpid(first, 0)
    wait_until(lambda: not watch.is_alive, "the watch to end")
    assert watch.ensure()
    assert watch.pid not in {None, first}
    assert watch.is_alive
    assert find_process(first) is None  # reaped
    assert f"event=death_watch_ended pid={first}" in caplog.text


def test_a_watch_that_can_not_be_started_is_tried_again(
    watch: DeathWatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(FileNotFoundError):
            watch.start()
        assert not watch.ensure()
    assert "event=death_watch_not_started" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert watch.ensure()


def test_a_watch_is_closed_once_and_stays_closed(watch: DeathWatch, caplog: pytest.LogCaptureFixture) -> None:
    pid = started(watch)
    watch.close()
    assert find_process(pid) is None
    watch.close()
    assert not watch.ensure()
    assert watch.pid is None
    assert caplog.text == ""  # nobody had to kill it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_watch_that_does_not_answer_is_closed_all_the_same(
    watch: DeathWatch, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(orphans, "CLOSE_S_MAX", 0.05)
    pid = started(watch)
    os.kill(pid, number)
    watch.close()
    assert find_process(pid) is None
