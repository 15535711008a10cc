"""What a tree of processes uses: processor time and memory, by /proc. Linux only."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.node.memory import pss_nbytes

_TICKS_HZ = os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS = (3, 4)  # idle, waiting for a device


@dataclass(frozen=True, slots=True)
class Tree:
    """A process and all that descends from it, but for some of them and what descends from those."""

    root: int
    without: Collection[int] = ()

    def pids(self) -> list[int]:
        """Those that are there now."""
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
        """Seconds on processors so far, those of children that ended and were waited for included."""
        stats = _all_stats()
        ticks = [sum(map(int, stats[pid][11:15])) for pid in self.pids() if pid in stats]
        return sum(ticks) / _TICKS_HZ

    def pss_nbytes(self) -> int:
        """Proportional set sizes together."""
        return sum(pss_nbytes(pid) or 0 for pid in self.pids())


class OthersWatch:
    """How much of the machine others than this process and its descendants use, from its making on."""

    def __init__(self, elapsed_clock_s: float) -> None:
        self._began_s = elapsed_clock_s
        self._own = Tree(os.getpid())
        self._others_s = _busy_s() - self._own.cpu_s()

    def share(self, elapsed_clock_s: float) -> float:
        """Share of all processors; time that the machine's host withheld counts as others'."""
        others_s = _busy_s() - self._own.cpu_s() - self._others_s
        return min(max(others_s / ((elapsed_clock_s - self._began_s) * (os.cpu_count() or 1)), 0.0), 1.0)


def _busy_s() -> float:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks for position, ticks in enumerate(fields) if position not in _IDLE_FIELDS) / _TICKS_HZ


def _all_stats() -> dict[int, list[str]]:
    """Fields behind the name, of every process: state, parent, …"""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found[int(entry)] = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
