"""What a hop (disk, page cache, network, write) really delivered: bytes, and the time it was busy. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_HALVED_AT_NBYTES = 8 << 30
"""The measured rate forgets: when so many bytes were counted, what was before counts half."""


@dataclass(slots=True)
class HopMeter:
    """Counts transfers that run side by side, each when it has ended. Time counts once, however many ran."""

    nbytes: int = 0
    seconds: float = 0.0
    _booked_to_s: float = 0.0
    _recent_nbytes: float = 0.0
    _recent_s: float = 0.0

    def book(self, nbytes: int, start_s: float, end_s: float) -> None:
        """A transfer ran from ``start_s`` to ``end_s``."""
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
        """Bytes a second while it was busy, lately; None before anything was measured."""
        return self._recent_nbytes / self._recent_s if self._recent_nbytes and self._recent_s else None
