"""Measures what a hop (disk, page cache, network, write) delivered: bytes, and the time it was busy. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_HALVED_AT_NBYTES = 8 << 30
"""Once the counts behind the measured rate exceed this, they are halved, so that older transfers lose weight."""


@dataclass(slots=True)
class HopMeter:
    """Counts concurrent transfers, each once it has ended. Time in which several ran is counted once."""

    nbytes: int = 0
    seconds: float = 0.0
    _booked_to_s: float = 0.0
    _recent_nbytes: float = 0.0
    _recent_s: float = 0.0

    def book(self, nbytes: int, start_s: float, end_s: float) -> None:
        """Count a transfer that ran from ``start_s`` to ``end_s``."""
        busy_s = max(0.0, end_s - max(start_s, self._booked_to_s))
        self._booked_to_s = max(self._booked_to_s, end_s)
        if self._recent_nbytes > _HALVED_AT_NBYTES:
            self._recent_nbytes, self._recent_s = self._recent_nbytes / 2, self._recent_s / 2
        self.nbytes += nbytes
        self.seconds += busy_s
        self._recent_nbytes += nbytes
        self._recent_s += busy_s

    @property
    def bps(self) -> float | None:
        """Recent bytes per second while busy; None before anything was measured."""
        return self._recent_nbytes / self._recent_s if self._recent_nbytes and self._recent_s else None
