"""History for debugging: the last events and actions about each partition and lease. Pure."""

from __future__ import annotations

from collections import deque

from sllm_vllm.store.core.events import Action, Event

LINES_MAX = 256
IDS_MAX = 512


class Story:
    """Keeps the last lines, (seconds, event or action), of the ids that were noted most recently."""

    def __init__(self) -> None:
        self._lines: dict[str | int, deque[tuple[float, Event | Action]]] = {}

    def note(self, now_s: float, what: Event | Action) -> None:
        """Add a line to the history of the lease and of the partition that ``what`` names."""
        for name in (getattr(what, "token", None), _partition_of(what)):
            if name is not None:
                # Remove and insert again, so that the ids are ordered by when they were last noted.
                lines = self._lines.pop(name, None)
                self._lines[name] = deque(maxlen=LINES_MAX) if lines is None else lines
                self._lines[name].append((now_s, what))
        while len(self._lines) > IDS_MAX:
            del self._lines[next(iter(self._lines))]

    def about(self, name: str | int) -> list[tuple[float, Event | Action]]:
        """Return the lines about ``name``, oldest first; empty if there are none."""
        return list(self._lines.get(name, ()))


def _partition_of(what: Event | Action) -> str | None:
    partition = getattr(what, "partition", None)
    return getattr(partition, "id", partition)
