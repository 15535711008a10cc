"""Invariants of the cache between two events, from the rules of DESIGN.md. Pure; inspects everything, so for tests."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sllm_vllm.store.core.partition import CachedPartition, Lease, Slot

if TYPE_CHECKING:
    from sllm_vllm.store.core.cache import Cache


def validate(cache: Cache) -> None:
    """Assert that the records are consistent, that limits are respected, and that no lease waits without a reason."""
    _validate_pool(cache)
    for name, partition in cache.partitions.items():
        assert partition.spec.id == name
        _validate_partition(cache, partition)
    for lease in cache.leases.values():
        _validate_lease(cache, lease)
    _validate_given(cache)
    assert cache.unused == {name: p for name, p in cache.partitions.items() if p.is_unused}
    assert cache.prefetching == {name: p for name, p in cache.partitions.items() if p.requests}
    _validate_progress(cache)


def _validate_pool(cache: Cache) -> None:
    """Rule 1: each slot is free, or holds or awaits one span. Rule 3: at least ``transit`` slots are not kept."""
    pool, partitions = cache.slots, cache.partitions.values()
    used = [slot.index for partition in partitions for slot in partition.slots.values()]
    assert sorted(used + pool.free) == list(range(pool.num_slots))
    is_kept = [slot.num_keepers > 0 or (p.is_pinned and slot.is_ready) for p in partitions for slot in p.slots.values()]
    assert sum(is_kept) <= pool.num_promised <= pool.num_slots - pool.transit
    assert pool.num_promised == sum(p.num_spans if p.is_pinned else p.num_kept for p in partitions)
    ranked = [p for p in partitions if p.idle and not p.is_pinned]
    assert pool.ranking == sorted((pool.policy.worth(p.usage), p.spec.id) for p in ranked)


def _validate_partition(cache: Cache, partition: CachedPartition) -> None:
    slots = partition.slots
    assert all(slot.partition is partition and slot.position == position for position, slot in slots.items())
    assert partition.filling == {position for position, slot in slots.items() if not slot.is_ready}
    assert partition.idle == sorted(p for p, slot in slots.items() if slot.is_ready and slot.num_given == 0)
    assert partition.num_kept == sum(slot.num_keepers > 0 for slot in slots.values())
    assert len(partition.filling) <= cache.reads_max
    leases = [lease for lease in cache.leases.values() if lease.partition is partition]
    assert partition.num_leases == len(leases)
    wanting = {lease.token for lease in leases if not lease.is_failed and lease.cursor < partition.num_spans}
    assert set(partition.loads) == wanting
    urgent = [slots[position].is_urgent for position in partition.filling if position >= partition.urgent_from]
    assert all(urgent), "a lease waits for a read that is not urgent"


def _validate_lease(cache: Cache, lease: Lease) -> None:
    """Check a lease against rules 2 and 3."""
    partition = lease.partition
    assert cache.partitions[partition.spec.id] is partition
    assert not lease.transit & lease.kept
    assert len(lease.transit) <= cache.window
    assert lease.hold or not lease.kept
    for position in lease.transit | lease.kept:
        assert position < lease.cursor
        assert partition.slots[position].is_ready, "a given span went"
    if lease.token in partition.loads:
        coming = range(lease.cursor, lease.read_at)
        assert all(position in partition.slots for position in coming), "a span that is thought to come does not"


def _validate_given(cache: Cache) -> None:
    given: Counter[Slot] = Counter()
    keepers: Counter[Slot] = Counter()
    for lease in cache.leases.values():
        given.update(lease.partition.slots[position] for position in lease.transit | lease.kept)
        keepers.update(lease.partition.slots[position] for position in lease.kept)
    for partition in cache.partitions.values():
        for slot in partition.slots.values():
            assert (slot.num_given, slot.num_keepers) == (given[slot], keepers[slot])


def _validate_progress(cache: Cache) -> None:
    """No wakeup was lost: each lease's next span was given if possible, and read if a slot was available."""
    has_spent = bool(cache.slots.free) or cache.slots.least_spent() is not None
    has_any = has_spent or cache.slots.least_wanted() is not None
    for partition in cache.partitions.values():
        may_read = len(partition.filling) < cache.reads_max
        for lease in partition.loads.values():
            slot = partition.slots.get(lease.cursor)
            if slot is None:
                assert not (may_read and has_any), f"lease {lease.token} waits in vain for a slot"
            elif slot.is_ready:
                assert len(lease.transit) == cache.window, f"lease {lease.token} waits in vain for a ready span"
                assert not (lease.hold and cache.slots.can_keep(slot)), f"lease {lease.token} could keep a span"
            is_all_here = lease.read_at >= partition.num_spans
            assert is_all_here or not (may_read and has_spent), f"lease {lease.token} does not read ahead"
