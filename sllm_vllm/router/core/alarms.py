"""Timers by name: what the core looks at again at a later time. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Alarms:
    """One alarm per name. The caller checks whether a name that is due still matters.

    Postponing an alarm leaves its old heap entry in place until that entry comes up, so a name that is postponed at
    every request keeps one heap entry instead of one per request.
    """

    def __init__(self) -> None:
        self._at_s: dict[str, float] = {}
        self._filed: dict[str, float] = {}
        """Each name's time in the heap: its alarm's time, or an earlier one."""
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, name: str, at_s: float) -> None:
        """Set the alarm for ``name``, replacing its previous time."""
        self._at_s[name] = at_s
        filed_s = self._filed.get(name)
        if filed_s is None or at_s < filed_s:
            self._file(name, at_s)

    def discard(self, name: str) -> None:
        """Cancel the alarm for ``name``, if any."""
        self._at_s.pop(name, None)

    def due(self, now_s: float) -> Iterator[str]:
        """Yield the names that are due, each once, ordered by time in the heap and then by name."""
        while self._heap and self._heap[0][0] <= now_s:
            filed_s, name = heapq.heappop(self._heap)
            if self._filed.get(name) != filed_s:
                continue
            del self._filed[name]
            at_s = self._at_s.get(name)
            if at_s is None:
                continue
            if at_s > now_s:
                self._file(name, at_s)
            else:
                del self._at_s[name]
                yield name

    def _file(self, name: str, at_s: float) -> None:
        self._filed[name] = at_s
        heapq.heappush(self._heap, (at_s, name))
