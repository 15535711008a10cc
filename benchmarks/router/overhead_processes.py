"""Processor time and memory of a tree of processes, read from /proc. Linux only."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.node.hardware import pss_nbytes

_TICKS_HZ = os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS = (3, 4)  # idle, waiting for a device


@dataclass(frozen=True, slots=True)
class Tree:
    """A process and its descendants, without the processes in ``without`` and their descendants."""

    root: int
    without: Collection[int] = ()

    def pids(self) -> list[int]:
        """The processes that exist now."""
        children: dict[int, list[int]] = {}
        for pid, fields in _all_stats().items():
            children.setdefault(int(fields[1]), []).append(pid)
        found, left = [], [self.root]
        while left:
            pid = left.pop()
            if pid not in self.without:
                found.append(pid)
                left += children.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """Processor seconds used so far, including those of children that have ended and were waited for."""
        stats = _all_stats()
        ticks = [sum(map(int, stats[pid][11:15])) for pid in self.pids() if pid in stats]
        return sum(ticks) / _TICKS_HZ

    def pss_nbytes(self) -> int:
        """Sum of the proportional set sizes."""
        return sum(pss_nbytes(pid) or 0 for pid in self.pids())


class OthersWatch:
    """Measures, from its construction on, how much of the machine others than this process and its descendants use."""

    def __init__(self, elapsed_clock_s: float) -> None:
        self._began_s = elapsed_clock_s
        self._own = Tree(os.getpid())
        self._others_s = _busy_s() - self._own.cpu_s()

    def share(self, elapsed_clock_s: float) -> float:
        """Share of all processors; includes time that the machine's host withheld."""
        others_s = _busy_s() - self._own.cpu_s() - self._others_s
        return min(max(others_s / ((elapsed_clock_s - self._began_s) * (os.cpu_count() or 1)), 0.0), 1.0)


def _busy_s() -> float:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks for position, ticks in enumerate(fields) if position not in _IDLE_FIELDS) / _TICKS_HZ


def _all_stats() -> dict[int, list[str]]:
    """The fields of /proc/PID/stat after the name (state, parent, …), for every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found[int(entry)] = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
