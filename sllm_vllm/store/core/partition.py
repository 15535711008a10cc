"""What the cache remembers of a slot, a partition and a lease. Pure records; ``slots.py`` and ``cache.py`` change them.

A *position* is an index into the partition's order: what a load wants first is at 0. Actions and events name spans,
everything in here goes by position.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from sllm_vllm.store.core.events import PartitionSpec
from sllm_vllm.store.core.policy import Usage


@dataclass(slots=True, eq=False)
class Slot:
    """A slot that is filling or ready; a free one is a mere number."""

    index: int
    partition: Partition
    position: int
    reader: int
    """Token of the lease that the read was begun for; 0: a prefetch."""
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
    """One load. What is before ``cursor`` was given; what is from there to ``read_at`` is filling or ready."""

    token: int
    partition: Partition
    hold: bool
    is_urgent: bool = True
    cursor: int = 0
    read_at: int = 0
    is_failed: bool = False
    transit: set[int] = field(default_factory=set)
    """Positions the client copies at this moment."""
    kept: set[int] = field(default_factory=set)
    """Positions the client looks at for as long as it likes."""


@dataclass(slots=True, eq=False)
class Partition:
    """A partition, and what of it is in the pool."""

    spec: PartitionSpec
    usage: Usage
    positions: dict[int, int] = field(init=False)
    """Span to position."""
    slots: dict[int, Slot] = field(default_factory=dict)
    """Position to slot, filling or ready."""
    filling: set[int] = field(default_factory=set)
    idle: list[int] = field(default_factory=list)
    """Positions that are ready and given to nobody, ascending."""
    rank: tuple[float, str] | None = None
    """Its place among those that have something to evict."""
    is_pinned: bool = False
    num_kept: int = 0
    """Slots with a keeper."""
    num_leases: int = 0
    loads: dict[int, Lease] = field(default_factory=dict)
    """The leases that still want something, by token."""
    requests: list[int] = field(default_factory=list)
    """Prefetches under way; they share one pass over the order."""
    fetch_at: int = 0
    """How far that pass came."""

    def __post_init__(self) -> None:
        self.positions = {span: position for position, span in enumerate(self.spec.order)}

    @property
    def num_spans(self) -> int:
        """Spans of the whole partition."""
        return len(self.spec.order)

    @property
    def num_resident(self) -> int:
        """Spans in memory."""
        return len(self.slots) - len(self.filling)

    @property
    def num_given(self) -> int:
        """Spans in memory that some client looks at."""
        return self.num_resident - len(self.idle)

    @property
    def is_unused(self) -> bool:
        """Whether nothing would be lost if it were forgotten."""
        return not (self.slots or self.num_leases or self.requests or self.is_pinned)

    @property
    def wanted_from(self) -> int:
        """The first position that some lease still wants; past the end if none does."""
        return min((lease.cursor for lease in self.loads.values()), default=self.num_spans)

    @property
    def urgent_from(self) -> int:
        """The first position that an urgent lease still wants; past the end if none does."""
        loads = self.loads.values()
        return min((lease.cursor for lease in loads if lease.is_urgent), default=self.num_spans)

    def least_spent(self, *, tail_first: bool) -> int | None:
        """The position to evict of those that no lease wants any more."""
        num_spent = bisect_left(self.idle, self.wanted_from)
        if num_spent == 0:
            return None
        return self.idle[num_spent - 1] if tail_first else self.idle[0]

    def least_wanted(self) -> int | None:
        """The idle position that loads come to last, but none that a lease waits for next."""
        nexts = {lease.cursor for lease in self.loads.values()}
        return next((position for position in reversed(self.idle) if position not in nexts), None)
