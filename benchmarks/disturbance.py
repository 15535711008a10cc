"""How much others used the processors while something was measured: tells a noisy figure from a bad one. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IDLE_FIELDS = (3, 4)  # idle, waiting for a device


class Disturbance:
    """Watches from its making on. The clock of the kernel ticks a hundred times a second."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), time.process_time()

    def share(self) -> float:
        """Share of all processors' time that went to other processes, or was withheld by the machine's host."""
        elapsed_s = (time.perf_counter() - self._start_s) * (os.cpu_count() or 1)
        others_s = (_busy_s() - self._busy_s) - (time.process_time() - self._own_s)
        return min(max(others_s / elapsed_s, 0.0), 1.0)


def _busy_s() -> float:
    """Seconds that all processors together were not idle; the last two fields are counted in others already."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks for position, ticks in enumerate(fields) if position not in _IDLE_FIELDS)
    return busy / os.sysconf("SC_CLK_TCK")
