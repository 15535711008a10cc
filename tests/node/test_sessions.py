"""The processes of a session are found and ended, whatever groups they are in; who has ended is reaped."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from sllm_vllm.node.engine_process import end_session, living_members, reap_adopted
from sllm_vllm.node.orphans import Process, find_process
from tests.support.waiting import DEADLINE_S, wait_until

_PR_SET_CHILD_SUBREAPER = 36
_LEADER = """
import os, signal, sys, time
for has_own_group in (False, True):
    if os.fork() == 0:
        if has_own_group:
            os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(900)
print("up", flush=True)
if sys.stdin.readline() == "go\\n":
    os._exit(7)
"""


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[str]]:
    """Leads a session of three; ends with 7 when told to go. What it leaves behind becomes this process's child."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", _LEADER],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    with process:
        yield process
        for pid in living_members(process.pid):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not living_members(process.pid), "the session to end")
    reap_adopted({process.pid})
    prctl(_PR_SET_CHILD_SUBREAPER, 0)


def leave(leader: subprocess.Popen[str]) -> None:
    """The leader ends, and is not reaped."""
    assert leader.stdin is not None
    leader.stdin.write("go\n")
    leader.stdin.flush()
    os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)


def test_members_are_found_in_every_group(leader: subprocess.Popen[str]) -> None:
    members = living_members(leader.pid)
    assert len(members) == 3
    assert leader.pid in members
    assert {process.session for pid in members if (process := find_process(pid))} == {leader.pid}


async def test_a_session_is_ended_with_its_leader(leader: subprocess.Popen[str]) -> None:
    assert await end_session(leader.pid, timeout_s=DEADLINE_S)
    assert living_members(leader.pid) == []
    assert leader.wait() == -signal.SIGKILL


async def test_a_session_is_ended_without_its_leader(leader: subprocess.Popen[str]) -> None:
    leave(leader)
    assert leader.wait() == 7
    assert len(living_members(leader.pid)) == 2
    assert await end_session(leader.pid, timeout_s=DEADLINE_S)
    assert living_members(leader.pid) == []


async def test_a_session_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose members can't be killed, as those that wait for a dead disk can't."""
    stuck = Process(pid=2**22 + 1, group=5, session=5, start=1, is_ended=False)
    monkeypatch.setattr("sllm_vllm.node.engine_process.all_processes", lambda: iter([stuck]))
    async with asyncio.timeout(DEADLINE_S):
        assert not await end_session(5, timeout_s=0.05)


async def test_nothing_is_left_to_do_where_there_is_no_session() -> None:
    assert await end_session(2**22 + 1, timeout_s=DEADLINE_S)


async def test_what_was_adopted_is_reaped(leader: subprocess.Popen[str]) -> None:
    leave(leader)
    leader.wait()
    children = living_members(leader.pid)
    await end_session(leader.pid, timeout_s=DEADLINE_S)
    assert reap_adopted([]) == 0
    assert reap_adopted([leader.pid]) == 2
    assert [find_process(pid) for pid in children] == [None, None]
    assert reap_adopted([leader.pid]) == 0


def test_processes_are_not_listed_while_no_child_has_ended(
    leader: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were, every second on the event loop: while a thread read a large configuration, that took a second."""
    listing = Mock(return_value=())
    monkeypatch.setattr("sllm_vllm.node.engine_process.all_processes", listing)
    assert reap_adopted([leader.pid]) == 0
    listing.assert_not_called()
    leave(leader)
    assert reap_adopted([leader.pid]) == 0
    listing.assert_called_once()


def test_a_leaders_status_is_left_to_whoever_started_it(leader: subprocess.Popen[str]) -> None:
    """It was reaped here, if it ended just before a tick, and its replica then stopped for ever."""
    leave(leader)
    assert reap_adopted([leader.pid]) == 0
    assert leader.wait() == 7
