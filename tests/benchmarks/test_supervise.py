"""Supervised work leaves nothing behind, however it ends."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.supervise import ROOT
from tests.support.process_tree import alive, descendants, read_until
from tests.support.waiting import DEADLINE_S

SCRIPT = """
import subprocess, sys
from pathlib import Path
from benchmarks.common.supervise import run_supervised

def work(workspace):
    (workspace.run / "half-written").write_text("x")
    (workspace.tmp / "socket").write_text("x")
    {body}

raise SystemExit(run_supervised(work, Path(sys.argv[1])))
"""
# A grandchild in a session of its own, which ignores SIGTERM's politeness no more than others do.
HANG = """
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"])
    print("ready", flush=True)
    import signal
    signal.pause()
"""


def start(body: str, cache: Path, tmp: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["env", f"TMPDIR={tmp}", sys.executable, "-c", SCRIPT.format(body=body), str(cache)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A cache and a temporary directory."""
    (tmp_path / "tmp").mkdir()
    return tmp_path / "cache", tmp_path / "tmp"


def left_behind(places: tuple[Path, Path]) -> list[str]:
    cache, tmp = places
    return [path.name for path in (*cache.iterdir(), *tmp.iterdir()) if path.name != ".lock"]


def test_status_of_the_work_is_returned(places: tuple[Path, Path]) -> None:
    process = start("return 7", *places)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 7
    assert left_behind(places) == []


def test_error_of_the_work_is_shown(places: tuple[Path, Path]) -> None:
    process = start("raise ValueError('on purpose')", *places)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert b"ValueError: on purpose" in output
    assert left_behind(places) == []


def test_work_that_leaves_processes_behind_is_tidied_up(places: tuple[Path, Path]) -> None:
    body = 'print(subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=-3).pid, flush=True); return 0'
    process = start(body, *places)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert not Path(f"/proc/{int(output)}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_every_process_and_removes_every_directory(number: int, places: tuple[Path, Path]) -> None:
    process = start(HANG, *places)
    read_until(process, "ready", DEADLINE_S)
    children = descendants(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + number
    assert b"cleaning up" in output
    assert len(children) >= 3
    assert alive(children) == set()
    assert left_behind(places) == []


def test_directory_of_a_killed_run_is_removed_by_the_next(places: tuple[Path, Path]) -> None:
    cache, _ = places
    (cache / "run-killed").mkdir(parents=True)
    (cache / "run-killed" / ".lock").touch()
    start("return 0", *places).communicate(timeout=DEADLINE_S)
    assert left_behind(places) == []


def test_directory_of_a_running_run_stays(places: tuple[Path, Path]) -> None:
    cache, _ = places
    (cache / "run-running").mkdir(parents=True)
    with (cache / "run-running" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start("return 0", *places).communicate(timeout=DEADLINE_S)
        assert left_behind(places) == ["run-running"]
