"""Measures how much processor time others used during a measurement: tells noise from bad figures. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IDLE_FIELDS = (3, 4)  # idle, waiting for a device


class Disturbance:
    """Measures from its construction on. The kernel counts processor time in hundredths of a second."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), time.process_time()

    def share(self) -> float:
        """Share of all processors' time that other processes used, or that the machine's host withheld."""
        elapsed_s = (time.perf_counter() - self._start_s) * (os.cpu_count() or 1)
        others_s = (_busy_s() - self._busy_s) - (time.process_time() - self._own_s)
        return min(max(others_s / elapsed_s, 0.0), 1.0)


def _busy_s() -> float:
    """Busy seconds of all processors together. The last two fields (guest time) are left out: others include them."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks for position, ticks in enumerate(fields) if position not in _IDLE_FIELDS)
    return busy / os.sysconf("SC_CLK_TCK")
