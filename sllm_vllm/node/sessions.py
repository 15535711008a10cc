"""The processes of an engine, found by their session: an engine leads one, and whatever it starts stays in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection

from sllm_vllm.node.orphans import TRACKER_S_MAX, all_processes, is_tracker
from sllm_vllm.run_loops import is_shortage

_POLL_S = 0.01


def living_members(session: int) -> list[int]:
    """Processes of a session that run."""
    return [process.pid for process in all_processes() if process.session == session and not process.is_ended]


def kill_members(session: int, *, also_trackers: bool = False) -> list[int]:
    """Kill the processes of a session (SIGKILL), but, unless said otherwise, those that tidy up after the others.

    As long as there is one, nobody else can get the session's number. Returns those that still ran.
    """
    members = living_members(session)
    for pid in members:
        if also_trackers or not is_tracker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return members


def kill_group(leader: int) -> None:
    """Kill a session leader's own group (SIGKILL): what can be done where no process can be looked at."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


async def end_session(session: int, *, timeout_s: float) -> bool:
    """Kill every process of a session, and return when none runs any more; False if some do in spite of it."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while _has_members(session, also_trackers=loop.time() - start_s > TRACKER_S_MAX):
        if loop.time() - start_s > timeout_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _has_members(session: int, *, also_trackers: bool) -> bool:
    """Kill them, and say whether there were any; a system that can't list them may have them."""
    try:
        return bool(kill_members(session, also_trackers=also_trackers))
    except OSError as error:
        if not is_shortage(error):
            raise
        return True


def reap_adopted(sessions: Collection[int]) -> int:
    """Reap what has ended of these sessions and is this process's child, but for their leaders; how many.

    An engine's children become this process's when their parent ends before them. Whoever started a leader waits for
    it, and wants its status.
    """
    num_reaped = 0
    for process in all_processes():
        if process.is_ended and process.session in sessions and process.pid != process.session:
            with contextlib.suppress(ChildProcessError):
                num_reaped += os.waitpid(process.pid, os.WNOHANG)[0] != 0
    return num_reaped
