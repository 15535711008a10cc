"""The rules of the cache for prefetches, faults and orders, and what it remembers: events in, actions out."""

from __future__ import annotations

import pytest

from sllm_vllm.store.core import cache as cache_module
from sllm_vllm.store.core.cache import UNUSED_MAX
from sllm_vllm.store.core.events import (
    IDS_MAX,
    LINES_MAX,
    DropSpan,
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
)
from sllm_vllm.store.core.snapshot import Counters, LeaseRow, PartitionRow
from tests.store.core.cache_bench import Bench, only

# ------------------------------------------------------------------------------------------------- rule 6: prefetches


def test_a_lease_that_can_wait_reads_as_a_fill_and_is_no_use_of_the_partition() -> None:
    bench = Bench(8)
    bench.know("p", 2)
    assert bench.tell(LeaseOpened(1, "p", hold=False, is_urgent=False)) == [
        StartRead("p", 0, 0, is_urgent=False),
        StartRead("p", 1, 1, is_urgent=False),
    ]
    assert bench.cache.snapshot().partitions[0].uses == 0
    assert bench.tell(LeaseOpened(2, "p", hold=False)) == [HurryRead("p", 0), HurryRead("p", 1)]
    assert bench.cache.snapshot().partitions[0].uses == 1


def test_a_lease_that_can_wait_hurries_no_fill() -> None:
    bench = Bench(8)
    bench.know("p", 2)
    bench.tell(PrefetchAsked(9, "p"))
    assert bench.tell(LeaseOpened(1, "p", hold=False, is_urgent=False)) == []


def test_a_prefetch_reads_in_order_and_not_urgently() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    assert bench.tell(PrefetchAsked(9, "p")) == [
        StartRead("p", 0, 0, is_urgent=False),
        StartRead("p", 1, 1, is_urgent=False),
    ]
    assert bench.tell(ReadDone("p", 0, 0)) == []
    assert bench.tell(ReadDone("p", 1, 1)) == [PrefetchEnded(9, "p", 2)]


def test_a_prefetch_of_what_is_here_ends_at_once() -> None:
    bench = Bench(4)
    bench.fill("p", 2, token=1)
    assert bench.tell(PrefetchAsked(9, "p")) == [PrefetchEnded(9, "p", 2)]


def test_a_prefetch_keeps_to_the_bound_of_reads() -> None:
    bench = Bench(4, reads_max=1)
    bench.know("p", 2)
    bench.tell(PrefetchAsked(9, "p"))
    assert bench.tell(ReadDone("p", 0, 0)) == [StartRead("p", 1, 1, is_urgent=False)]


def test_a_prefetch_displaces_what_is_worth_less() -> None:
    bench = Bench(2)
    bench.fill("cheap", 2, token=1)
    bench.know("dear", 1, bps=0.1)
    assert bench.tell(PrefetchAsked(9, "dear")) == [DropSpan("cheap", 1, 1), StartRead("dear", 0, 1, is_urgent=False)]


def test_a_prefetch_displaces_nothing_of_as_much_worth() -> None:
    bench = Bench(2)
    bench.fill("a", 1, token=1)
    bench.know("b", 2)
    bench.tell(PrefetchAsked(9, "b"))
    assert bench.tell(ReadDone("b", 0, 1)) == [PrefetchEnded(9, "b", 1)]
    assert bench.resident("a") == 1


def test_a_prefetch_that_a_lease_wants_is_hurried() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    bench.tell(PrefetchAsked(9, "p"))
    assert bench.tell(LeaseOpened(1, "p", hold=False)) == [HurryRead("p", 0), HurryRead("p", 1)]
    assert bench.tell(LeaseOpened(2, "p", hold=False)) == []


def test_two_prefetches_of_one_partition_share_its_reads() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    assert bench.tell(PrefetchAsked(8, "p"), PrefetchAsked(9, "p")) == []
    assert bench.tell(ReadDone("p", 0, 0)) == [PrefetchEnded(8, "p", 1), PrefetchEnded(9, "p", 1)]


# ------------------------------------------------------------------------------------------------------ rule 7: faults


def test_a_failed_read_fails_every_lease_that_still_wants_the_span() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    bench.tell(LeaseOpened(1, "p", hold=False), LeaseOpened(2, "p", hold=False))
    assert bench.tell(ReadFailed("p", 1, 1, "why")) == [FailLease(1, 1, "why"), FailLease(2, 1, "why")]


def test_a_failed_lease_gets_nothing_more() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    bench.tell(LeaseOpened(1, "p", hold=False), ReadFailed("p", 1, 1, "why"))
    assert bench.tell(ReadDone("p", 0, 0)) == []
    assert bench.tell(SpansReleased(1, (0,))) == []


def test_a_lease_that_has_the_span_behind_it_does_not_fail() -> None:
    bench = Bench(4, window=1)
    bench.fill("p", 3, token=1)
    bench.tell(LeaseOpened(2, "p", hold=False), SpansReleased(2, (0,)), EvictAsked("p"))
    bench.tell(LeaseOpened(3, "p", hold=False))
    assert bench.tell(ReadFailed("p", 0, 0, "why")) == [FailLease(3, 0, "why")]


def test_a_failed_read_makes_place_for_a_read_of_another_lease_on_the_partition() -> None:
    bench = Bench(4, window=1, reads_max=1)
    bench.fill("p", 3, token=1)
    bench.tell(LeaseOpened(2, "p", hold=False), SpansReleased(2, (0,)), EvictAsked("p"), ReadDone("p", 2, 2))
    bench.tell(LeaseOpened(3, "p", hold=False))
    assert bench.tell(EvictAsked("p")) == [DropSpan("p", 2, 2)]
    assert bench.tell(ReadFailed("p", 0, 0, "why")) == [FailLease(3, 0, "why"), StartRead("p", 2, 0, is_urgent=True)]


def test_the_next_lease_tries_anew() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    bench.tell(LeaseOpened(1, "p", hold=False), ReadFailed("p", 0, 0, "why"))
    assert bench.tell(LeaseOpened(2, "p", hold=False)) == [StartRead("p", 0, 0, is_urgent=True)]


def test_a_failed_read_ends_a_prefetch() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    bench.tell(PrefetchAsked(9, "p"), ReadDone("p", 0, 0))
    assert bench.tell(ReadFailed("p", 1, 1, "why")) == [PrefetchEnded(9, "p", 1, "why")]


def test_a_slot_of_a_failed_read_serves_another_lease() -> None:
    bench = Bench(1)
    bench.know("a", 1)
    bench.know("b", 1)
    bench.tell(LeaseOpened(1, "a", hold=False), LeaseOpened(2, "b", hold=False))
    actions = bench.tell(ReadFailed("a", 0, 0, "why"))
    assert actions == [FailLease(1, 0, "why"), StartRead("b", 0, 0, is_urgent=True)]


# --------------------------------------------------------------------------------------------------- rule 8: by order


def test_pinned_spans_stay() -> None:
    bench = Bench(4)
    bench.fill("pinned", 2, token=1)
    bench.tell(PinAsked("pinned", pinned=True))
    bench.fill("dear", 4, token=2, bps=0.01)
    assert bench.resident("pinned") == 2


def test_an_unpinned_partition_makes_room_for_who_waits() -> None:
    bench = Bench(2)
    bench.fill("p", 1, token=1)
    bench.fill("a", 1, token=2)
    bench.know("b", 1)
    bench.tell(PinAsked("p", pinned=True), LeaseOpened(3, "a", hold=False), LeaseOpened(4, "b", hold=False))
    assert bench.tell(PinAsked("p", pinned=False)) == [DropSpan("p", 0, 0), StartRead("b", 0, 0, is_urgent=True)]


def test_a_pin_must_leave_the_transit_slots_over() -> None:
    bench = Bench(4, transit=2)
    bench.know("small", 2)
    bench.know("large", 3)
    assert bench.cache.can_pin("small")
    assert not bench.cache.can_pin("large")
    with pytest.raises(AssertionError, match="ask can_pin first"):
        bench.tell(PinAsked("large", pinned=True))


def test_kept_slots_count_against_a_pin_of_others_only() -> None:
    bench = Bench(4, transit=2)
    bench.know("a", 2)
    bench.know("b", 1)
    bench.load("a", 1, hold=True)
    assert bench.cache.can_pin("a")
    assert not bench.cache.can_pin("b")


def test_spans_to_come_of_a_pinned_partition_are_promised_their_slots() -> None:
    bench = Bench(4, transit=2)
    bench.know("p", 2)
    bench.know("a", 1)
    bench.tell(PinAsked("p", pinned=True), PinAsked("p", pinned=True))
    assert only(bench.load("a", 1, hold=True), GiveSpan) == [GiveSpan(1, 0, 0, keep=False)]
    assert bench.cache.can_pin("p")


def test_an_operator_evicts_what_nobody_holds_pinned_or_not() -> None:
    bench = Bench(4, window=1)
    bench.fill("p", 2, token=1)
    bench.tell(PinAsked("p", pinned=True), LeaseOpened(2, "p", hold=False), LeaseClosed(2))
    assert bench.tell(EvictAsked("p")) == [DropSpan("p", 0, 0), DropSpan("p", 1, 1)]
    assert bench.cache.residency("p") == (0, 0, False)


def test_what_an_operator_can_not_evict_is_resident_afterwards() -> None:
    bench = Bench(4, window=1)
    bench.fill("p", 1, token=1)
    bench.tell(LeaseOpened(2, "p", hold=False))
    assert bench.tell(EvictAsked("p")) == []
    bench.tell(LeaseClosed(2))
    assert bench.resident("p") == 1


def test_an_operator_ends_prefetches() -> None:
    bench = Bench(4)
    bench.know("p", 2)
    bench.tell(PrefetchAsked(9, "p"), ReadDone("p", 0, 0))
    assert bench.tell(EvictAsked("p")) == [DropSpan("p", 0, 0), PrefetchEnded(9, "p", 0)]
    assert bench.tell(ReadDone("p", 1, 1)) == []
    assert bench.resident("p") == 1


# ------------------------------------------------------------------------------------------ memory, story, snapshot


def test_a_partition_of_which_something_is_here_is_not_forgotten() -> None:
    bench = Bench(4)
    bench.fill("p", 1, token=1)
    assert not bench.cache.forget("p")


def test_a_forgotten_partitions_use_is_remembered() -> None:
    bench = Bench(4)
    bench.fill("p", 1, token=1)
    bench.tell(EvictAsked("p"))
    assert bench.cache.forget("p")
    assert bench.cache.residency("p") == (0, 0, False)
    bench.know("p", 1)
    assert bench.cache.snapshot().partitions[0].uses == 1


def test_records_of_what_is_not_here_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "USAGES_MAX", 3)
    bench = Bench(4)
    for number in range(UNUSED_MAX + 9):
        bench.know(str(number), 1)
    assert len(bench.cache.partitions) == UNUSED_MAX
    assert len(bench.cache._usages) == 3


def test_one_id_with_two_orders_is_a_programmers_error() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    with pytest.raises(AssertionError, match="two orders"):
        bench.know("p", 2)


def test_a_token_is_used_once() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    bench.tell(LeaseOpened(1, "p", hold=False))
    with pytest.raises(AssertionError, match="1 is open already"):
        bench.tell(LeaseOpened(1, "p", hold=False))


def test_a_story_tells_of_a_lease_and_of_a_partition() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    bench.tell(LeaseOpened(1, "p", hold=False), ReadDone("p", 0, 0))
    assert bench.cache.story(1) == [(2.0, LeaseOpened(1, "p", hold=False)), (3.0, GiveSpan(1, 0, 0, keep=False))]
    kinds = [type(what) for _, what in bench.cache.story("p")]
    assert kinds == [PartitionKnown, LeaseOpened, StartRead, ReadDone]
    assert bench.cache.story("unheard") == []


def test_stories_are_bounded() -> None:
    bench = Bench(4)
    bench.know("p", 1)
    for token in range(1, IDS_MAX + 1):
        bench.tell(LeaseOpened(token, "p", hold=False), LeaseClosed(token))
    assert bench.cache.story(1) == []
    assert len(bench.cache.story("p")) == LINES_MAX


def test_a_snapshot_tells_all() -> None:
    bench = Bench(8, transit=4, window=1)
    bench.know("p", 3)
    bench.know("q", 2)
    bench.tell(LeaseOpened(1, "p", hold=True), ReadDone("p", 0, 0), PinAsked("p", pinned=True))
    bench.tell(LeaseOpened(2, "q", hold=False), ReadFailed("q", 1, 4, "why"), LeaseOpened(3, "p", hold=False))
    snapshot = bench.cache.snapshot()
    assert (snapshot.num_free, snapshot.num_filling, snapshot.num_ready) == (4, 3, 1)
    assert (snapshot.num_kept, snapshot.num_pinned) == (1, 1)
    assert snapshot.leases == (
        LeaseRow(1, "p", hold=True, is_failed=False, num_wanted=2, num_given=1, num_kept=1),
        LeaseRow(2, "q", hold=False, is_failed=True, num_wanted=0, num_given=0, num_kept=0),
        LeaseRow(3, "p", hold=False, is_failed=False, num_wanted=2, num_given=1, num_kept=0),
    )
    assert snapshot.partitions == (
        PartitionRow("p", "model p", 3, 1, is_pinned=True, uses=2, last_used_s=8.0),
        PartitionRow("q", "model q", 2, 0, is_pinned=False, uses=1, last_used_s=6.0),
    )
    assert snapshot.counters == Counters(num_hits=1, num_misses=1, num_reads=5, num_failed=1)
