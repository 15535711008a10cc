"""What is to be looked at later, by time. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Alarms:
    """One time for each name; whoever gets a name looks whether it still matters.

    A time that is put off stays where it is in the heap until it comes up, so a name that is put off at every request
    takes one entry and not one a request.
    """

    def __init__(self) -> None:
        self._at_s: dict[str, float] = {}
        self._filed: dict[str, float] = {}
        """The time under which a name is in the heap: its own, or an earlier one."""
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, name: str, at_s: float) -> None:
        """Ring then, and not when it was to ring before."""
        self._at_s[name] = at_s
        filed_s = self._filed.get(name)
        if filed_s is None or at_s < filed_s:
            self._file(name, at_s)

    def discard(self, name: str) -> None:
        """Do not ring."""
        self._at_s.pop(name, None)

    def due(self, now_s: float) -> Iterator[str]:
        """Those whose time has come; each once, the earliest first, equal ones by name."""
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
