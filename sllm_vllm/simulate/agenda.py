"""The virtual clock: planned callbacks, run in the order of time. Owned by ``World``."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Agenda:
    """Callbacks for the same time run in the order in which they were planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._num_planned = 0

    def at(self, at_s: float, happen: Callable[[], None]) -> None:
        """Plan a callback for a time."""
        self._num_planned += 1
        heapq.heappush(self._planned, (at_s, self._num_planned, happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Plan a callback for ``seconds`` from now."""
        self.at(self.now_s + seconds, happen)

    def step(self, until_s: float) -> bool:
        """Run the next callback; returns False if none is planned by ``until_s``."""
        if not self._planned or self._planned[0][0] > until_s:
            return False
        self.now_s, _, happen = heapq.heappop(self._planned)
        happen()
        return True
