"""The cache's records of slots, partitions and leases. Pure; ``slots.py`` and ``cache.py`` change them.

A *position* is an index into the partition's order: the span that a load needs first is at position 0. Events and
actions refer to spans; these records use positions.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from sllm_vllm.store.core.events import PartitionSpec
from sllm_vllm.store.core.policy import Usage


@dataclass(slots=True, eq=False)
class Slot:
    """A slot that is filling or ready. Free slots have no record, only an index in ``Slots.free``."""

    index: int
    partition: CachedPartition
    position: int
    reader: int
    """Token of the lease for which the read was started; 0 for a prefetch."""
    is_urgent: bool
    is_ready: bool = False
    num_given: int = 0
    num_keepers: int = 0

    @property
    def span(self) -> int:
        """The span it holds or will hold."""
        return self.partition.spec.order[self.position]


@dataclass(slots=True, eq=False)
class Lease:
    """One load. Positions before ``cursor`` were given; those from there up to ``read_at`` are filling or ready."""

    token: int
    partition: CachedPartition
    hold: bool
    is_urgent: bool = True
    cursor: int = 0
    read_at: int = 0
    is_failed: bool = False
    transit: set[int] = field(default_factory=set)
    """Positions that the client is copying now."""
    kept: set[int] = field(default_factory=set)
    """Positions that the client may use until it releases them."""


@dataclass(slots=True, eq=False)
class CachedPartition:
    """A partition, and which of its spans are in the pool."""

    spec: PartitionSpec
    usage: Usage
    positions: dict[int, int] = field(init=False)
    """Span to position."""
    slots: dict[int, Slot] = field(default_factory=dict)
    """Position to slot, filling or ready."""
    filling: set[int] = field(default_factory=set)
    idle: list[int] = field(default_factory=list)
    """Positions that are ready and not given to any client, ascending."""
    rank: tuple[float, str] | None = None
    """Its entry in ``Slots.ranking``; None if it has nothing to evict."""
    is_pinned: bool = False
    num_kept: int = 0
    """Slots with a keeper."""
    num_leases: int = 0
    loads: dict[int, Lease] = field(default_factory=dict)
    """Leases that have not been given all spans and have not failed, by token."""
    requests: list[int] = field(default_factory=list)
    """Ids of the prefetches in progress, which share one pass over the order."""
    fetch_at: int = 0
    """Next position of that pass."""

    def __post_init__(self) -> None:
        self.positions = {span: position for position, span in enumerate(self.spec.order)}

    @property
    def num_spans(self) -> int:
        """Number of spans in the whole partition."""
        return len(self.spec.order)

    @property
    def num_resident(self) -> int:
        """Number of spans in memory."""
        return len(self.slots) - len(self.filling)

    @property
    def num_given(self) -> int:
        """Number of spans in memory that at least one client uses."""
        return self.num_resident - len(self.idle)

    @property
    def is_unused(self) -> bool:
        """Whether it can be forgotten: it has no slots, leases, prefetches or pin."""
        return not (self.slots or self.num_leases or self.requests or self.is_pinned)

    @property
    def wanted_from(self) -> int:
        """The first position that any lease still wants; ``num_spans`` if there is none."""
        return min((lease.cursor for lease in self.loads.values()), default=self.num_spans)

    @property
    def urgent_from(self) -> int:
        """The first position that an urgent lease still wants; ``num_spans`` if there is none."""
        loads = self.loads.values()
        return min((lease.cursor for lease in loads if lease.is_urgent), default=self.num_spans)

    def least_spent(self, *, tail_first: bool) -> int | None:
        """Return the idle position to evict among those that no lease wants any more; None if there is none."""
        num_spent = bisect_left(self.idle, self.wanted_from)
        if num_spent == 0:
            return None
        return self.idle[num_spent - 1] if tail_first else self.idle[0]

    def least_wanted(self) -> int | None:
        """Return the last idle position in load order that is not the next position of any lease; None if none is."""
        nexts = {lease.cursor for lease in self.loads.values()}
        return next((position for position in reversed(self.idle) if position not in nexts), None)
