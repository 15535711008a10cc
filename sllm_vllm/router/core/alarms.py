"""What is to be looked at later, by time. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Alarms(Generic[T]):
    """Things with times; whoever gets one looks whether it still matters. Equal times keep the order they came in."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._num_set = 0

    def set(self, at_s: float, what: T) -> None:
        """Ring then."""
        self._num_set += 1
        heapq.heappush(self._heap, (at_s, self._num_set, what))

    def due(self, now_s: float) -> Iterator[T]:
        """Those whose time has come; each once."""
        while self._heap and self._heap[0][0] <= now_s:
            yield heapq.heappop(self._heap)[2]
