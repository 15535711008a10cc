"""The pool's slots: which are free, which may be evicted in what order, and how many are promised to keepers. Pure.

Owned by one ``Cache``. A slot's life cycle is ``free → fill → ready → (give → release)* → drop → free``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort

from sllm_vllm.store.core.partition import CachedPartition, Slot
from sllm_vllm.store.core.policy import EvictionPolicy


class PoolSlots:
    """All slots of the pool. Each slot is free or in exactly one partition's ``slots``.

    ``num_promised`` counts the slots with a keeper plus *all* spans of pinned partitions, resident or not. So there is
    a slot for a pinned span that is read later, and at least ``transit`` slots are always left for copying.
    """

    def __init__(self, num_slots: int, *, transit: int, policy: EvictionPolicy) -> None:
        self.num_slots = num_slots
        self.transit = transit
        self.policy = policy
        self.free = list(reversed(range(num_slots)))
        self.num_promised = 0
        self.ranking: list[tuple[float, str]] = []
        """(worth, id) of each partition that has a span to evict, ascending."""
        self._evictable: dict[str, CachedPartition] = {}

    # ------------------------------------------------------------------------------------------------ a slot's life

    def fill(self, partition: CachedPartition, position: int, *, reader: int) -> Slot:
        """Take a free slot for a read. The caller ensures that there is one."""
        is_urgent = position >= partition.urgent_from
        slot = Slot(self.free.pop(), partition, position, reader=reader, is_urgent=is_urgent)
        partition.slots[position] = slot
        partition.filling.add(position)
        return slot

    def ready(self, slot: Slot) -> None:
        """Record that the slot's read finished."""
        slot.is_ready = True
        slot.partition.filling.remove(slot.position)
        self._idle(slot)

    def give(self, slot: Slot, *, keep: bool) -> None:
        """Count one more client that uses the slot."""
        if slot.num_given == 0:
            self._not_idle(slot)
        slot.num_given += 1
        if keep:
            slot.num_keepers += 1
            if slot.num_keepers == 1:
                self._count_kept(slot.partition, 1)

    def release(self, slot: Slot, *, keep: bool) -> None:
        """Count one client less that uses the slot."""
        slot.num_given -= 1
        if keep:
            slot.num_keepers -= 1
            if slot.num_keepers == 0:
                self._count_kept(slot.partition, -1)
        if slot.num_given == 0:
            self._idle(slot)

    def drop(self, slot: Slot) -> None:
        """Free the slot. No client may be using it."""
        if slot.is_ready:
            self._not_idle(slot)
        else:
            slot.partition.filling.remove(slot.position)
        del slot.partition.slots[slot.position]
        self.free.append(slot.index)

    # ---------------------------------------------------------------------------------------------------- promises

    def can_keep(self, slot: Slot) -> bool:
        """Whether one more client may keep the slot."""
        is_promised = slot.num_keepers > 0 or slot.partition.is_pinned
        return is_promised or self.num_promised < self.num_slots - self.transit

    def can_pin(self, partition: CachedPartition) -> bool:
        """Whether at least ``transit`` slots would remain if the partition were pinned."""
        more = partition.num_spans - partition.num_kept
        return partition.is_pinned or self.num_promised + more <= self.num_slots - self.transit

    def pin(self, partition: CachedPartition, *, pinned: bool) -> None:
        """Pin or unpin the partition: promise slots for all of its spans, or withdraw that promise."""
        if partition.is_pinned == pinned:
            return
        more = partition.num_spans - partition.num_kept
        self.num_promised += more if pinned else -more
        partition.is_pinned = pinned
        self.rank(partition)

    def _count_kept(self, partition: CachedPartition, change: int) -> None:
        partition.num_kept += change
        if not partition.is_pinned:
            self.num_promised += change

    # ---------------------------------------------------------------------------------------------------- eviction

    def least_spent(self, *, worth_max: float = math.inf) -> Slot | None:
        """Return the evictable slot of least worth, below ``worth_max``, whose span no lease wants any more, if any."""
        for worth, name in self.ranking:
            if worth >= worth_max:
                break
            partition = self._evictable[name]
            position = partition.least_spent(tail_first=self.policy.tail_first)
            if position is not None:
                return partition.slots[position]
        return None

    def least_wanted(self) -> Slot | None:
        """Return the evictable slot of least worth that is not the next span of any lease, if any.

        Leases may still want its span later. Called only when ``least_spent`` finds nothing.
        """
        for _, name in self.ranking:
            partition = self._evictable[name]
            position = partition.least_wanted()
            if position is not None:
                return partition.slots[position]
        return None

    def touch(self, partition: CachedPartition, now_s: float) -> None:
        """Record that a load of the partition begins or is expected."""
        self.policy.touch(partition.usage, now_s)
        self.rank(partition)

    def rank(self, partition: CachedPartition) -> None:
        """Update the partition's entry in the ranking. Call it after a change of worth, pin or idle slots."""
        rank = None
        if partition.idle and not partition.is_pinned:
            rank = (self.policy.worth(partition.usage), partition.spec.id)
        if rank == partition.rank:
            return
        if partition.rank is not None:
            del self.ranking[bisect_left(self.ranking, partition.rank)]
            del self._evictable[partition.spec.id]
        if rank is not None:
            insort(self.ranking, rank)
            self._evictable[partition.spec.id] = partition
        partition.rank = rank

    def _idle(self, slot: Slot) -> None:
        insort(slot.partition.idle, slot.position)
        if len(slot.partition.idle) == 1:
            self.rank(slot.partition)

    def _not_idle(self, slot: Slot) -> None:
        idle = slot.partition.idle
        del idle[bisect_left(idle, slot.position)]
        if not idle:
            self.rank(slot.partition)
