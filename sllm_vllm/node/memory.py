"""Memory use of an engine: the proportional set sizes of its processes, read from the system.

A page that several processes have mapped counts in equal parts for each, so that the sizes of forked engines, which
share most of their pages, can be added up. Blocking, milliseconds for each process: called in a thread.
"""

from __future__ import annotations

from sllm_vllm.node.orphans import all_processes
from sllm_vllm.units import KIB

_PSS = b"\nPss:"


def pss_nbytes(pid: int) -> int | None:
    """A process's proportional share of memory; None if it is gone or belongs to another user."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            rest = file.read().partition(_PSS)[2]
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    # A process that has ended but is not reaped has no lines.
    return int(rest.split(maxsplit=1)[0]) * KIB if rest else None


def session_pss_nbytes(leader: int) -> int:
    """The sum over a session's processes; 0 if none lives.

    Args:
        leader: the process that made the session; it may have ended.
    """
    pids = [process.pid for process in all_processes() if process.session == leader and not process.is_ended]
    return sum(pss_nbytes(pid) or 0 for pid in pids)
