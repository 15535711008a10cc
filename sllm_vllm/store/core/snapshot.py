"""The state of the cache for display and metrics, as frozen records. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sllm_vllm.store.core.cache import Cache


@dataclass(slots=True)
class Counters:
    """Counts of spans since the start. A *miss* was read for the lease it was given to; any other given is a *hit*."""

    num_hits: int = 0
    num_misses: int = 0
    num_reads: int = 0
    num_failed: int = 0
    num_evicted: int = 0

    def count_given(self, *, was_read: bool) -> None:
        """Count a given span. ``was_read``: the read was started for this lease, so it is a miss."""
        if was_read:
            self.num_misses += 1
        else:
            self.num_hits += 1


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """One open lease. ``num_wanted``: spans still to be given; ``num_given``, ``num_kept``: spans it uses now."""

    token: int
    partition: str
    hold: bool
    is_failed: bool
    num_wanted: int
    num_given: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class PartitionRow:
    """One known partition."""

    id: str
    name: str
    num_spans: int
    num_resident: int
    is_pinned: bool
    uses: int
    last_used_s: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool, its leases and partitions. ``num_kept`` and ``num_pinned`` are within ``num_ready`` and may overlap."""

    num_free: int
    num_filling: int
    num_ready: int
    num_kept: int
    num_pinned: int
    leases: tuple[LeaseRow, ...]
    partitions: tuple[PartitionRow, ...]
    counters: Counters


def snapshot_of(cache: Cache) -> Snapshot:
    """Copy the state of a cache. Later changes of the cache do not affect the copy."""
    partitions = cache.partitions.values()
    return Snapshot(
        num_free=len(cache.slots.free),
        num_filling=sum(len(partition.filling) for partition in partitions),
        num_ready=sum(partition.num_resident for partition in partitions),
        num_kept=sum(partition.num_kept for partition in partitions),
        num_pinned=sum(partition.num_resident for partition in partitions if partition.is_pinned),
        leases=tuple(
            LeaseRow(
                token=lease.token,
                partition=lease.partition.spec.id,
                hold=lease.hold,
                is_failed=lease.is_failed,
                num_wanted=0 if lease.is_failed else lease.partition.num_spans - lease.cursor,
                num_given=len(lease.transit) + len(lease.kept),
                num_kept=len(lease.kept),
            )
            for lease in cache.leases.values()
        ),
        partitions=tuple(
            PartitionRow(
                id=partition.spec.id,
                name=partition.spec.name,
                num_spans=partition.num_spans,
                num_resident=partition.num_resident,
                is_pinned=partition.is_pinned,
                uses=partition.usage.uses,
                last_used_s=partition.usage.last_used_s,
            )
            for partition in partitions
        ),
        counters=replace(cache.counters),
    )
