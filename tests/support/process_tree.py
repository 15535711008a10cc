"""Which processes are there: what descends from one, and what is left of it. Linux only."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from pathlib import Path

Identity = tuple[int, str]
"""A process: its number, and the time of its start, as numbers come back."""


def descendants(root: int) -> set[Identity]:
    """Everything that a process started, and what that started, while its line of parents is unbroken."""
    parents = {pid: fields for pid in _pids() if (fields := _stat(pid)) is not None}
    found = {root}
    while more := {pid for pid, fields in parents.items() if int(fields[1]) in found} - found:
        found |= more
    return {(pid, parents[pid][19]) for pid in found - {root} if pid in parents}


def alive(processes: set[Identity]) -> set[int]:
    """Those that still run; one that has ended and was not collected does not."""
    found = {(pid, started): _stat(pid) for pid, started in processes}
    return {pid for (pid, started), fields in found.items() if fields and fields[19] == started and fields[0] != "Z"}


def read_until(process: subprocess.Popen[bytes], text: str, timeout_s: float) -> str:
    """What a process prints, up to the line that holds ``text``; fails if it ends or is silent about it too long."""
    assert process.stdout is not None
    deadline_s, output = time.monotonic() + timeout_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while text.encode() not in output:
            assert selector.select(deadline_s - time.monotonic()), f"no {text!r} in time in: {output.decode()}"
            piece = os.read(process.stdout.fileno(), 1 << 16)
            assert piece, f"it ended without {text!r}: {output.decode()}"
            output += piece
    return output.decode()


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat`` behind the name: state, parent, …; the 20th is the time of its start."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
