"""The virtual clock: what will happen, in the order of time. Owned by ``World``."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Agenda:
    """What happens at the same time happens in the order in which it was planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._num_planned = 0

    def at(self, at_s: float, happen: Callable[[], None]) -> None:
        """Have something happen."""
        self._num_planned += 1
        heapq.heappush(self._planned, (at_s, self._num_planned, happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Have something happen so long from now."""
        self.at(self.now_s + seconds, happen)

    def step(self, until_s: float) -> bool:
        """Let the next thing happen; False if there is none until then."""
        if not self._planned or self._planned[0][0] > until_s:
            return False
        self.now_s, _, happen = heapq.heappop(self._planned)
        happen()
        return True
