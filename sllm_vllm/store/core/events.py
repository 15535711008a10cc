"""What happens to the store's memory, and what is to be done about it. Pure: events in, actions out of ``cache.py``.

A *span* is as many whole chunks of a checkpoint's partition as fit in one *slot* of the pool; with default sizes, one
chunk. Spans are numbered along the partition's data. A *token* is a lease's number: it grows with every lease, also
over restarts of the daemon, so that an old one can never pass for a new one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    """One rank's partition as the store sees it.

    ``id`` is a digest of its contents: equal ids mean equal bytes, wherever they lie. ``order`` holds every span once,
    in the order in which a load wants them. ``name`` is for people.
    """

    id: str
    name: str
    order: tuple[int, ...]
    nbytes: int


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class PartitionKnown:
    """A partition can be had at ``bps`` bytes a second over the slowest hop left. Told again when that changes."""

    partition: PartitionSpec
    bps: float


@dataclass(frozen=True, slots=True)
class LeaseOpened:
    """A client wants a whole partition, in its order. With ``hold`` it would rather keep slots mapped than copy.

    One that is not urgent can wait: its reads are fills, and it is no use of the partition (the write-behind's).
    """

    token: int
    partition: str
    hold: bool
    is_urgent: bool = True


@dataclass(frozen=True, slots=True)
class SpansReleased:
    """The client no longer looks at these spans; those it never held are ignored (it may tell twice)."""

    token: int
    spans: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseClosed:
    """The client is done, or dead: all it held is free."""

    token: int


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """Bring a partition into memory, as far as it displaces nothing of more worth. ``request`` names the asker."""

    request: int
    partition: str


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """Drop whatever of a partition nobody holds, pinned or not, and stop prefetching it."""

    partition: str


@dataclass(frozen=True, slots=True)
class PinAsked:
    """Keep (or no longer keep) a partition's spans from eviction, once they are here."""

    partition: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class ReadDone:
    """The slot holds the span now, verified."""

    partition: str
    span: int
    slot: int


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """The span can't be had. ``error`` is whatever the shell wants to hear again in ``FailLease``."""

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
    """Fill a slot with a span. ``is_urgent``: a lease waits for it; else it is a fill."""

    partition: str
    span: int
    slot: int
    is_urgent: bool


@dataclass(frozen=True, slots=True)
class HurryRead:
    """A fill that was ordered before is waited for by a lease now."""

    partition: str
    span: int


@dataclass(frozen=True, slots=True)
class GiveSpan:
    """Tell the client where a span lies. ``keep``: it may look at the slot for as long as it likes; else it copies and
    releases at once."""

    token: int
    span: int
    slot: int
    keep: bool


@dataclass(frozen=True, slots=True)
class FailLease:
    """Tell the client that a span can't be had. The lease stays until it closes it, but gets nothing more."""

    token: int
    span: int
    error: object


@dataclass(frozen=True, slots=True)
class DropSpan:
    """A slot was given up; for counters, nothing has to be done."""

    partition: str
    span: int
    slot: int


@dataclass(frozen=True, slots=True)
class PrefetchEnded:
    """A prefetch came to its end: ``num_resident`` spans of the partition are in memory. ``error`` if a read failed."""

    request: int
    partition: str
    num_resident: int
    error: object = None


Action = StartRead | HurryRead | GiveSpan | FailLease | DropSpan | PrefetchEnded
