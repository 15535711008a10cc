"""Memory of processes and sessions: shared pages are counted once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from sllm_vllm.node.hardware import pss_nbytes, session_pss_nbytes
from sllm_vllm.units import MIB

BLOCK_NBYTES = 64 * MIB
_ALONE = f"block = b'x' * {BLOCK_NBYTES}; print('up', flush=True); input()"
_TOGETHER = f"""
import os, signal
block = b"x" * {BLOCK_NBYTES}
if os.fork() == 0:
    os.setpgid(0, 0)
    print("up", flush=True)
    signal.pause()
input()
"""
_LEAVES = """
import os, signal
if os.fork() == 0:
    print("up", flush=True)
    signal.pause()
"""

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a script as the leader of a session, and wait until it has said that it is up."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        for pid in session(process.pid):
            os.kill(pid, 9)
        process.communicate()


def session(leader: int) -> list[int]:
    listed = subprocess.run(["ps", "-s", str(leader), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def test_a_process_has_what_it_has_written(start: Start) -> None:
    nbytes = pss_nbytes(start(_ALONE).pid)
    assert nbytes is not None
    assert BLOCK_NBYTES < nbytes < BLOCK_NBYTES + 32 * MIB


def test_pages_that_processes_share_count_once(start: Start) -> None:
    leader = start(_TOGETHER).pid
    both = [pss_nbytes(pid) for pid in session(leader)]
    assert len(both) == 2
    for nbytes in both:
        assert nbytes is not None
        assert BLOCK_NBYTES / 2 < nbytes < BLOCK_NBYTES
    assert BLOCK_NBYTES < session_pss_nbytes(leader) < BLOCK_NBYTES + 32 * MIB


def test_a_session_may_have_lost_its_leader(start: Start) -> None:
    leader = start(_LEAVES)
    leader.wait()
    assert session_pss_nbytes(leader.pid) > 0


def test_one_that_has_ended_has_none(start: Start) -> None:
    process = start(_ALONE)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert pss_nbytes(process.pid) is None  # not reaped
    assert session_pss_nbytes(process.pid) == 0
    process.wait()
    assert pss_nbytes(process.pid) is None  # gone
    assert session_pss_nbytes(process.pid) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look at everybody")
def test_another_users_is_not_told() -> None:
    assert pss_nbytes(1) is None
