"""The events that ``cache.py`` takes and the actions that it returns. Pure records.

A *span* is as many whole chunks of a checkpoint's partition as fit in one *slot* of the pool; with default sizes, one
chunk. Spans are numbered by their place in the partition's data. A *token* identifies a lease: it increases with every
lease, also across restarts of the daemon, so that an old token is never mistaken for a new one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    """One rank's partition as the store sees it.

    ``id`` is a digest of its contents: equal ids mean equal bytes, wherever they are stored. ``order`` holds every span
    once, in the order in which a load needs them. ``name`` is for display.
    """

    id: str
    name: str
    order: tuple[int, ...]
    nbytes: int


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class PartitionKnown:
    """A partition can be read at ``bps`` bytes per second over the slowest hop. Sent again when the rate changes."""

    partition: PartitionSpec
    bps: float


@dataclass(frozen=True, slots=True)
class LeaseOpened:
    """A client wants a whole partition, in its order. With ``hold`` it prefers to keep slots mapped, not copy them.

    A lease with ``is_urgent`` false is the write-behind's: its reads are fills, and it does not count as a use of the
    partition.
    """

    token: int
    partition: str
    hold: bool
    is_urgent: bool = True


@dataclass(frozen=True, slots=True)
class SpansReleased:
    """The client no longer uses these spans. Spans that it does not hold are ignored: a client may release twice."""

    token: int
    spans: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseClosed:
    """The client has finished or died; everything it held is released."""

    token: int


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """Read a partition into memory without evicting spans worth as much or more. ``request`` identifies the request."""

    request: int
    partition: str


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """Unpin a partition, drop its spans that no client holds, and end its prefetches."""

    partition: str


@dataclass(frozen=True, slots=True)
class PinAsked:
    """Protect a partition's resident spans from eviction, or stop protecting them."""

    partition: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A read finished: the slot holds the span, verified."""

    partition: str
    span: int
    slot: int


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A read failed. ``error`` is opaque to the core, and returned in ``FailLease``."""

    partition: str
    span: int
    slot: int
    error: object


Event = (
    PartitionKnown
    | LeaseOpened
    | SpansReleased
    | LeaseClosed
    | PrefetchAsked
    | EvictAsked
    | PinAsked
    | ReadDone
    | ReadFailed
)

# ----------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class StartRead:
    """Read a span into a slot. ``is_urgent``: an urgent lease waits for it; otherwise the read is a fill."""

    partition: str
    span: int
    slot: int
    is_urgent: bool


@dataclass(frozen=True, slots=True)
class HurryRead:
    """An urgent lease now waits for a read that was started as a fill."""

    partition: str
    span: int


@dataclass(frozen=True, slots=True)
class GiveSpan:
    """Tell the client which slot holds a span. ``keep``: it may use the slot until it releases it; otherwise it must
    copy the span and release it at once."""

    token: int
    span: int
    slot: int
    keep: bool


@dataclass(frozen=True, slots=True)
class FailLease:
    """Tell the client that a span can't be read. The lease stays open until the client closes it, but gets no spans."""

    token: int
    span: int
    error: object


@dataclass(frozen=True, slots=True)
class DropSpan:
    """A slot was freed. For counters only; ``Store`` does nothing."""

    partition: str
    span: int
    slot: int


@dataclass(frozen=True, slots=True)
class PrefetchEnded:
    """A prefetch ended with ``num_resident`` spans of the partition in memory. ``error`` is set if a read failed."""

    request: int
    partition: str
    num_resident: int
    error: object = None


Action = StartRead | HurryRead | GiveSpan | FailLease | DropSpan | PrefetchEnded


# History for debugging: the last events and actions about each partition and lease. Pure.


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
