"""What happened to a partition or a lease: the last events and actions about each. Pure."""

from __future__ import annotations

from collections import deque

from sllm_vllm.store.core.events import Action, Event

LINES_MAX = 256
IDS_MAX = 512


class Story:
    """For each of the ids heard of last, its last lines: (seconds, event or action)."""

    def __init__(self) -> None:
        self._lines: dict[str | int, deque[tuple[float, Event | Action]]] = {}

    def note(self, now_s: float, what: Event | Action) -> None:
        """Add a line to the stories of all whom it names."""
        for name in (getattr(what, "token", None), _partition_of(what)):
            if name is not None:
                # Out and in again: the ids stay in the order in which they were heard of last.
                lines = self._lines.pop(name, None)
                self._lines[name] = deque(maxlen=LINES_MAX) if lines is None else lines
                self._lines[name].append((now_s, what))
        while len(self._lines) > IDS_MAX:
            del self._lines[next(iter(self._lines))]

    def about(self, name: str | int) -> list[tuple[float, Event | Action]]:
        """Its lines, oldest first; none if nothing is remembered."""
        return list(self._lines.get(name, ()))


def _partition_of(what: Event | Action) -> str | None:
    partition = getattr(what, "partition", None)
    return getattr(partition, "id", partition)
