"""Finds and ends the processes of an engine by their session: an engine leads one, and all that it starts stay in
it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection

from sllm_vllm.daemon.run_loops import is_shortage
from sllm_vllm.node.orphans import TRACKER_S_MAX, all_processes, is_tracker

_POLL_S = 0.01


def living_members(session: int) -> list[int]:
    """The running processes of a session."""
    return [process.pid for process in all_processes() if process.session == session and not process.is_ended]


def kill_members(session: int, *, also_trackers: bool = False) -> list[int]:
    """Kill the processes of a session (SIGKILL); resource trackers, which clean up after the others, only on request.

    While one of them exists, the session's id can't be reused. Returns those that still ran.
    """
    members = living_members(session)
    for pid in members:
        if also_trackers or not is_tracker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return members


def kill_group(leader: int) -> None:
    """Kill a session leader's own group (SIGKILL): all that is possible where processes can't be listed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


async def end_session(session: int, *, timeout_s: float) -> bool:
    """Kill every process of a session, and wait until none runs; returns False if some still run after
    ``timeout_s``."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while _has_members(session, also_trackers=loop.time() - start_s > TRACKER_S_MAX):
        if loop.time() - start_s > timeout_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _has_members(session: int, *, also_trackers: bool) -> bool:
    """Kill the members and return whether there were any; if they can't be listed, assume that there are."""
    try:
        return bool(kill_members(session, also_trackers=also_trackers))
    except OSError as error:
        if not is_shortage(error):
            raise
        return True


def reap_adopted(sessions: Collection[int]) -> int:
    """Reap ended children of this process in these sessions, except for the sessions' leaders; returns how many.

    An engine's children become this process's when their parent ends before them. Leaders are left to the code that
    started them, which waits for their status.
    """
    num_reaped = 0
    for process in all_processes():
        if process.is_ended and process.session in sessions and process.pid != process.session:
            with contextlib.suppress(ChildProcessError):
                num_reaped += os.waitpid(process.pid, os.WNOHANG)[0] != 0
    return num_reaped
