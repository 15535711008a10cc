"""Decides what the pool holds, for which leases, and what is evicted: events in, actions out. Pure.

DESIGN.md has the rules that comments cite by number. Owned by the daemon's run loop. An event first updates the records
and marks the leases that it may unblock. These are then *served* in token order: ready spans are given to them, and
reads are started for missing ones.
"""

from __future__ import annotations

from typing import NamedTuple, assert_never

from sllm_vllm.store.core.events import (
    Action,
    DropSpan,
    Event,
    EvictAsked,
    FailLease,
    GiveSpan,
    HurryRead,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PinAsked,
    PrefetchAsked,
    PrefetchEnded,
    ReadDone,
    ReadFailed,
    SpansReleased,
    StartRead,
    Story,
)
from sllm_vllm.store.core.invariants import validate
from sllm_vllm.store.core.partition import CachedPartition, Lease, Slot
from sllm_vllm.store.core.policy import EvictionPolicy, Usage
from sllm_vllm.store.core.slots import PoolSlots
from sllm_vllm.store.core.snapshot import Counters, Snapshot, snapshot_of

UNUSED_MAX = 64
"""Most partitions that stay known with no span in memory and no lease, prefetch or pin."""
USAGES_MAX = 4096
"""Most forgotten partitions whose usage is remembered, in case they become known again."""


class SpanCounts(NamedTuple):
    """How many spans of a partition are in memory, and how many of these clients are using."""

    num_resident: int
    num_given: int
    pinned: bool


class Cache:
    """The pool of one node. ``transit``, ``window`` and ``reads_max`` are defined in DESIGN.md; their defaults depend
    on the pool's size. Send ``PartitionKnown`` shortly before any other event about an unused partition: only the
    ``UNUSED_MAX`` most recently touched unused partitions stay known."""

    def __init__(
        self,
        num_slots: int,
        *,
        policy: EvictionPolicy,
        transit: int | None = None,
        window: int | None = None,
        reads_max: int | None = None,
    ) -> None:
        transit = max(1, min(32, num_slots // 4)) if transit is None else transit
        self.window = max(1, min(8, num_slots // 4)) if window is None else window
        self.reads_max = max(1, min(16, num_slots // 4)) if reads_max is None else reads_max
        assert 1 <= transit <= num_slots, f"{transit} of {num_slots} slots for transit"
        assert self.window >= 1
        assert self.reads_max >= 1
        self.slots = PoolSlots(num_slots, transit=transit, policy=policy)
        self.partitions: dict[str, CachedPartition] = {}
        self.leases: dict[int, Lease] = {}
        self.prefetching: dict[str, CachedPartition] = {}
        self.unused: dict[str, CachedPartition] = {}
        """Partitions with no span in memory and no lease, prefetch or pin; the most recently touched is last."""
        self.counters = Counters()
        self._story = Story()
        self._usages: dict[str, Usage] = {}
        self._waiting: set[int] = set()
        """Tokens of leases to serve: the current event may unblock them, or they lacked a slot earlier."""
        self._dry: set[bool] = set()
        """While leases are served, the kinds of read that found no slot: of a next span (True), or ahead (False)."""
        self._touched: set[str] = set()
        self._actions: list[Action] = []

    # --------------------------------------------------------------------------------------------------- interface

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Process an event. Returns the actions that the caller must carry out, in this order."""
        self._story.note(now_s, event)
        actions = self._actions = list[Action]()
        self._record(event, now_s)
        self._serve_leases()
        self._serve_prefetches()
        self._forget_unused()
        for action in actions:
            self._story.note(now_s, action)
        return actions

    def can_pin(self, partition_id: str) -> bool:
        """Whether ``PinAsked`` is allowed now: with all of its spans pinned, ``transit`` slots must remain."""
        return self.slots.can_pin(self.partitions[partition_id])

    def residency(self, partition_id: str) -> SpanCounts:
        """Return a partition's residency; zero if the partition is not known."""
        partition = self.partitions.get(partition_id)
        if partition is None:
            return SpanCounts(0, 0, pinned=False)
        return SpanCounts(partition.num_resident, partition.num_given, partition.is_pinned)

    def snapshot(self) -> Snapshot:
        """Return the whole state, for display and metrics."""
        return snapshot_of(self)

    def story(self, name: str | int) -> list[tuple[float, Event | Action]]:
        """Return the last events and actions about a partition's id or a lease's token, oldest first."""
        return self._story.about(name)

    def validate(self) -> None:
        """Assert every invariant. Inspects the whole state, so for tests and the simulator only."""
        validate(self)

    def forget(self, partition_id: str) -> bool:
        """Forget a partition if it is unused. Returns whether it was forgotten."""
        partition = self.unused.pop(partition_id, None)
        if partition is None:
            return False
        del self.partitions[partition_id]
        self._usages[partition_id] = partition.usage
        if len(self._usages) > USAGES_MAX:
            del self._usages[next(iter(self._usages))]
        return True

    # ------------------------------------------------------------------------------------------------------ events

    def _record(self, event: Event, now_s: float) -> None:
        match event:
            case PartitionKnown():
                self._partition_known(event)
            case LeaseOpened():
                self._lease_opened(event, now_s)
            case SpansReleased():
                self._spans_released(event)
            case LeaseClosed():
                self._lease_closed(event)
            case PrefetchAsked():
                self._prefetch_asked(event, now_s)
            case EvictAsked():
                self._evict_asked(event)
            case PinAsked():
                self._pin_asked(event)
            case ReadDone():
                self._read_done(event)
            case ReadFailed():
                self._read_failed(event)
            case _:
                assert_never(event)

    def _partition_known(self, event: PartitionKnown) -> None:
        spec = event.partition
        assert event.bps > 0
        span_s = spec.nbytes / max(1, len(spec.order)) / event.bps
        if spec.id not in self.partitions:
            self.partitions[spec.id] = CachedPartition(spec, self._usages.pop(spec.id, Usage(span_s)))
        partition = self._touch(spec.id)
        assert partition.spec.order == spec.order, f"{spec.name}: one id, two orders"
        partition.spec = spec
        partition.usage.span_s = span_s
        self.slots.rank(partition)

    def _lease_opened(self, event: LeaseOpened, now_s: float) -> None:
        assert event.token not in self.leases, f"lease {event.token} is open already"
        partition = self._touch(event.partition)
        lease = Lease(event.token, partition, event.hold, is_urgent=event.is_urgent)
        self.leases[event.token] = lease
        partition.num_leases += 1
        if partition.num_spans:
            partition.loads[lease.token] = lease
            self._waiting.add(lease.token)
        if event.is_urgent:
            partition.usage.uses += 1
            partition.usage.last_used_s = now_s
            self._hurry(partition)
        self.slots.touch(partition, now_s)

    def _hurry(self, partition: CachedPartition) -> None:
        """Make the partition's fills urgent, because an urgent lease now waits for them."""
        for position in sorted(partition.filling):
            slot = partition.slots[position]
            if not slot.is_urgent:
                slot.is_urgent = True
                self._actions.append(HurryRead(partition.spec.id, slot.span))

    def _spans_released(self, event: SpansReleased) -> None:
        lease = self.leases.get(event.token)
        if lease is not None:
            positions = lease.partition.positions
            self._release(lease, {positions[span] for span in event.spans if span in positions})
            self._waiting.add(lease.token)

    def _lease_closed(self, event: LeaseClosed) -> None:
        lease = self.leases.pop(event.token, None)
        if lease is not None:
            self._touch(lease.partition.spec.id)
            self._release(lease, lease.transit | lease.kept)
            lease.partition.num_leases -= 1
            lease.partition.loads.pop(lease.token, None)

    def _prefetch_asked(self, event: PrefetchAsked, now_s: float) -> None:
        partition = self._touch(event.partition)
        partition.requests.append(event.request)
        partition.fetch_at = 0
        self.prefetching[event.partition] = partition
        self.slots.touch(partition, now_s)

    def _evict_asked(self, event: EvictAsked) -> None:
        partition = self._touch(event.partition)
        self.slots.pin(partition, pinned=False)
        for position in list(partition.idle):
            self._drop(partition.slots[position])
        self._end_prefetches(partition)

    def _pin_asked(self, event: PinAsked) -> None:
        partition = self._touch(event.partition)
        assert not event.pinned or self.slots.can_pin(partition), "ask can_pin first"
        self.slots.pin(partition, pinned=event.pinned)

    def _read_done(self, event: ReadDone) -> None:
        slot = self._filling_slot(event)
        self.slots.ready(slot)
        self._waiting.update(slot.partition.loads)

    def _read_failed(self, event: ReadFailed) -> None:
        slot = self._filling_slot(event)
        partition = slot.partition
        self.counters.num_failed += 1
        self.slots.drop(slot)
        for lease in sorted(partition.loads.values(), key=lambda lease: lease.token):
            if lease.cursor <= slot.position:
                lease.is_failed = True
                del partition.loads[lease.token]
                self._actions.append(FailLease(lease.token, event.span, event.error))
        self._waiting.update(partition.loads)
        self._end_prefetches(partition, event.error)

    def _filling_slot(self, event: ReadDone | ReadFailed) -> Slot:
        partition = self._touch(event.partition)
        slot = partition.slots[partition.positions[event.span]]
        assert not slot.is_ready
        assert slot.index == event.slot, f"span {event.span} is read into slot {slot.index}, not {event.slot}"
        return slot

    # ------------------------------------------------------------------------------------------------------ leases

    def _serve_leases(self) -> None:
        """Rule 4: serve leases in token order; a lease that must wait does not block others.

        Serving makes no slot evictable, so if no slot was found for one lease, there is none for the next either.
        """
        waiting, self._waiting = sorted(self._waiting), set()
        self._dry.clear()
        for token in waiting:
            lease = self.leases.get(token)
            if lease is not None and token in lease.partition.loads:
                self._give_ready(lease)
                self._read_missing(lease)

    def _give_ready(self, lease: Lease) -> None:
        """Give the lease its next spans while they are ready (rules 2 and 3)."""
        partition = lease.partition
        while (slot := partition.slots.get(lease.cursor)) is not None and slot.is_ready:
            keep = lease.hold and self.slots.can_keep(slot)
            if not keep and len(lease.transit) == self.window:
                if lease.hold:
                    self._waiting.add(lease.token)  # another lease's release may let it keep the slot
                return
            self.slots.give(slot, keep=keep)
            (lease.kept if keep else lease.transit).add(slot.position)
            lease.cursor += 1
            self.counters.count_given(was_read=slot.reader == lease.token)
            self._actions.append(GiveSpan(lease.token, slot.span, slot.index, keep))
        if lease.cursor == partition.num_spans:
            del partition.loads[lease.token]

    def _read_missing(self, lease: Lease) -> None:
        """Start reads of the lease's missing spans, as far as slots allow (rules 4 and 5)."""
        partition = lease.partition
        lease.read_at = max(lease.read_at, lease.cursor)
        while lease.read_at < partition.num_spans and len(partition.filling) < self.reads_max:
            if lease.read_at not in partition.slots:
                if not self._make_room(for_next=lease.read_at == lease.cursor):
                    self._waiting.add(lease.token)
                    return
                self._start_read(partition, lease.read_at, reader=lease.token)
            lease.read_at += 1

    def _make_room(self, *, for_next: bool) -> bool:
        """Free a slot if none is free. Returns whether one is free now.

        Spans that leases still want are evicted only for a span that another lease waits for next, never for reading
        ahead. Otherwise two loads, or the head and tail of one load, would keep evicting each other's spans.
        """
        if self.slots.free:
            return True
        if for_next in self._dry:
            return False
        victim = self.slots.least_spent()
        if victim is None and for_next:
            victim = self.slots.least_wanted()
        if victim is None:
            self._dry |= {False, for_next}
            return False
        self._evict(victim)
        return True

    def _release(self, lease: Lease, positions: set[int]) -> None:
        for kind, keep in ((lease.transit, False), (lease.kept, True)):
            for position in sorted(positions & kind):
                kind.remove(position)
                self.slots.release(lease.partition.slots[position], keep=keep)

    # ------------------------------------------------------------------------------------------ prefetches, slots

    def _serve_prefetches(self) -> None:
        """Start reads for prefetches, and end those that are complete or out of slots (rule 6)."""
        for partition in list(self.prefetching.values()):
            while partition.fetch_at < partition.num_spans and len(partition.filling) < self.reads_max:
                if partition.fetch_at not in partition.slots:
                    if not self._make_room_below(partition):
                        partition.fetch_at = partition.num_spans
                        break
                    self._start_read(partition, partition.fetch_at, reader=0)
                partition.fetch_at += 1
            if partition.fetch_at == partition.num_spans and not partition.filling:
                self._end_prefetches(partition)

    def _make_room_below(self, partition: CachedPartition) -> bool:
        """Free a slot if none is free, evicting only spans of lower worth. Returns whether one is free now."""
        if self.slots.free:
            return True
        victim = self.slots.least_spent(worth_max=self.slots.policy.worth(partition.usage))
        if victim is None:
            return False
        self._evict(victim)
        return True

    def _end_prefetches(self, partition: CachedPartition, error: object = None) -> None:
        self.prefetching.pop(partition.spec.id, None)
        for request in partition.requests:
            self._actions.append(PrefetchEnded(request, partition.spec.id, partition.num_resident, error))
        partition.requests.clear()
        self._touched.add(partition.spec.id)

    def _start_read(self, partition: CachedPartition, position: int, *, reader: int) -> None:
        slot = self.slots.fill(partition, position, reader=reader)
        self._touched.add(partition.spec.id)
        self.counters.num_reads += 1
        self._actions.append(StartRead(partition.spec.id, slot.span, slot.index, slot.is_urgent))

    def _evict(self, victim: Slot) -> None:
        """Drop a slot's span because another span needs the slot."""
        self.slots.policy.evicted(self.slots.policy.worth(victim.partition.usage))
        self._drop(victim)

    def _drop(self, slot: Slot) -> None:
        self.slots.drop(slot)
        self.counters.num_evicted += 1
        self._touched.add(slot.partition.spec.id)
        for lease in slot.partition.loads.values():
            if lease.cursor <= slot.position < lease.read_at:
                lease.read_at = slot.position
            self._waiting.add(lease.token)
        self._actions.append(DropSpan(slot.partition.spec.id, slot.span, slot.index))

    # -------------------------------------------------------------------------------------------------- partitions

    def _touch(self, partition_id: str) -> CachedPartition:
        """Return the record of a known partition, and mark it as touched."""
        assert partition_id in self.partitions, f"partition {partition_id} is not known"
        self._touched.add(partition_id)
        return self.partitions[partition_id]

    def _forget_unused(self) -> None:
        for partition_id in sorted(self._touched):
            self.unused.pop(partition_id, None)
            partition = self.partitions[partition_id]
            if partition.is_unused:
                self.unused[partition_id] = partition
        self._touched.clear()
        while len(self.unused) > UNUSED_MAX:
            self.forget(next(iter(self.unused)))
