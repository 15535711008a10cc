"""The rules of the cache for leases, reads and slots, one by one: events in, actions out. Rules as in DESIGN.md."""

from __future__ import annotations

import pytest

from sllm_vllm.store.core.cache import Cache
from sllm_vllm.store.core.events import (
    DropSpan,
    EvictAsked,
    GiveSpan,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PartitionSpec,
    ReadDone,
    SpansReleased,
    StartRead,
)
from sllm_vllm.store.core.policy import policy_named
from tests.store.core.cache_bench import Bench, only
from tests.support.cases import every_case

# -------------------------------------------------------------------------------------------- rules 1, 2: reads, gifts


def test_a_lease_has_its_spans_read_in_order() -> None:
    bench = Bench(8)
    spec = PartitionSpec("p", "model", (2, 0, 1), 3)
    bench.tell(PartitionKnown(spec, 1.0))
    assert bench.tell(LeaseOpened(1, "p", hold=False)) == [
        StartRead("p", 2, 0, is_urgent=True),
        StartRead("p", 0, 1, is_urgent=True),
        StartRead("p", 1, 2, is_urgent=True),
    ]


def test_a_span_is_given_as_soon_as_it_is_ready() -> None:
    bench = Bench(8)
    bench.know("p", 2)
    bench.tell(LeaseOpened(1, "p", hold=False))
    assert bench.tell(ReadDone("p", 0, 0)) == [GiveSpan(1, 0, 0, keep=False)]


def test_spans_that_are_ready_too_early_are_given_in_order() -> None:
    bench = Bench(8)
    bench.know("p", 2)
    assert bench.tell(LeaseOpened(1, "p", hold=False), ReadDone("p", 1, 1)) == []
    assert bench.tell(ReadDone("p", 0, 0)) == [GiveSpan(1, 0, 0, keep=False), GiveSpan(1, 1, 1, keep=False)]


def test_one_read_serves_all_who_wait() -> None:
    bench = Bench(8)
    bench.know("p", 1)
    assert bench.tell(LeaseOpened(1, "p", hold=False), LeaseOpened(2, "p", hold=False)) == []
    assert bench.tell(ReadDone("p", 0, 0)) == [GiveSpan(1, 0, 0, keep=False), GiveSpan(2, 0, 0, keep=False)]


def test_a_resident_partition_is_given_at_once() -> None:
    bench = Bench(8)
    bench.fill("p", 4, token=1)
    assert bench.tell(LeaseOpened(2, "p", hold=True)) == [GiveSpan(2, span, span, keep=True) for span in range(4)]


def test_an_empty_partition_wants_nothing() -> None:
    bench = Bench(8)
    bench.know("p", 0)
    assert bench.tell(LeaseOpened(1, "p", hold=True)) == []
    assert bench.tell(LeaseClosed(1)) == []


def test_a_read_that_nobody_waits_for_any_more_leaves_its_span_in_memory() -> None:
    bench = Bench(8)
    bench.know("p", 1)
    bench.tell(LeaseOpened(1, "p", hold=False), LeaseClosed(1))
    assert bench.tell(ReadDone("p", 0, 0)) == []
    assert bench.cache.residency("p") == (1, 0, False)


def test_a_read_into_another_slot_is_a_programmers_error() -> None:
    bench = Bench(8)
    bench.know("p", 1)
    bench.tell(LeaseOpened(1, "p", hold=False))
    with pytest.raises(AssertionError, match="into slot 0, not 3"):
        bench.tell(ReadDone("p", 0, 3))


def test_a_lease_on_an_unknown_partition_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="p is not known"):
        Bench(8).tell(LeaseOpened(1, "p", hold=False))


# ------------------------------------------------------------------------------------------------ rule 3: keep or copy


def test_no_more_than_the_window_is_in_transit() -> None:
    bench = Bench(8, window=2)
    bench.fill("p", 4, token=1)
    assert bench.tell(LeaseOpened(2, "p", hold=False)) == [GiveSpan(2, 0, 0, keep=False), GiveSpan(2, 1, 1, keep=False)]
    assert bench.tell(SpansReleased(2, (0,))) == [GiveSpan(2, 2, 2, keep=False)]


def test_spans_are_kept_until_only_transit_slots_are_left() -> None:
    bench = Bench(3, transit=1, window=1)
    bench.know("p", 4)
    gifts = only(bench.load("p", 1, hold=True), GiveSpan)
    assert [gift.keep for gift in gifts if isinstance(gift, GiveSpan)] == [True, True, False, False]


def test_a_kept_slot_may_be_kept_by_more() -> None:
    bench = Bench(3, transit=1)
    bench.know("p", 2)
    bench.load("p", 1, hold=True)
    assert bench.tell(LeaseOpened(2, "p", hold=True)) == [GiveSpan(2, 0, 0, keep=True), GiveSpan(2, 1, 1, keep=True)]
    bench.tell(LeaseClosed(1))
    assert bench.cache.snapshot().num_kept == 2


def test_a_client_that_waits_keeps_a_span_when_another_lets_go() -> None:
    bench = Bench(3, transit=1, window=1)
    bench.know("a", 2)
    bench.know("b", 2)
    bench.load("a", 1, hold=True)
    bench.tell(LeaseOpened(2, "b", hold=True), ReadDone("b", 0, 2))
    assert bench.tell(SpansReleased(1, (0,))) == [DropSpan("a", 0, 0), StartRead("b", 1, 0, is_urgent=True)]
    assert bench.tell(ReadDone("b", 1, 0)) == [GiveSpan(2, 1, 0, keep=True)]


def test_a_full_window_ends_when_there_is_room_to_keep() -> None:
    bench = Bench(4, transit=2, window=1)
    bench.know("a", 2)
    bench.know("b", 2)
    bench.load("a", 1, hold=True)
    bench.tell(LeaseOpened(2, "b", hold=True), ReadDone("b", 0, 2))
    assert bench.tell(ReadDone("b", 1, 3)) == []
    assert bench.tell(LeaseClosed(1)) == [GiveSpan(2, 1, 3, keep=True)]


def test_one_slot_serves_every_load_in_turn() -> None:
    bench = Bench(1)
    bench.know("a", 2)
    bench.know("b", 2)
    first, second = bench.load("a", 1, hold=True), bench.load("b", 2, hold=True)
    assert only(first, GiveSpan) == [GiveSpan(1, 0, 0, keep=False), GiveSpan(1, 1, 0, keep=False)]
    assert only(second, GiveSpan) == [GiveSpan(2, 0, 0, keep=False), GiveSpan(2, 1, 0, keep=False)]


def test_what_was_never_held_is_released_in_vain() -> None:
    bench = Bench(8)
    bench.fill("p", 4, token=1)
    bench.tell(LeaseOpened(2, "p", hold=False))
    assert bench.tell(SpansReleased(2, (3, 77))) == []


def test_words_about_a_closed_lease_are_ignored() -> None:
    bench = Bench(8)
    assert bench.tell(SpansReleased(1, (0,)), LeaseClosed(1)) == []


@every_case("num_slots", [1, 2, 5, 64, 65_536])
def test_limits_fit_any_pool(num_slots: int) -> None:
    cache = Cache(num_slots, policy=policy_named("cost"))
    assert 1 <= cache.slots.transit <= num_slots
    assert cache.window >= 1
    assert cache.reads_max >= 1


# ------------------------------------------------------------------------------------------- rules 4, 5: slots, reads


def test_the_partition_of_least_worth_goes_first() -> None:
    bench = Bench(4)
    bench.fill("dear", 2, token=1, bps=0.1)
    bench.fill("cheap", 2, token=2)
    bench.know("new", 1)
    assert bench.tell(LeaseOpened(3, "new", hold=False))[0] == DropSpan("cheap", 1, 3)


def test_a_partition_told_to_be_nearer_is_worth_less() -> None:
    bench = Bench(4)
    bench.fill("far", 2, token=1, bps=0.1)
    bench.fill("near", 2, token=2)
    bench.know("far", 2, bps=10.0)
    bench.know("new", 1)
    assert bench.tell(LeaseOpened(3, "new", hold=False))[0] == DropSpan("far", 1, 1)


def test_lru_drops_the_head_of_what_was_used_longest_ago() -> None:
    bench = Bench(4, policy="lru")
    bench.fill("old", 2, token=1, bps=0.1)
    bench.fill("late", 2, token=2)
    bench.know("new", 1)
    assert bench.tell(LeaseOpened(3, "new", hold=False))[0] == DropSpan("old", 0, 0)


def test_a_load_larger_than_the_pool_streams_through_and_leaves_its_head() -> None:
    bench = Bench(4, reads_max=1)
    bench.fill("p", 9, token=1)
    gifts = bench.tell(LeaseOpened(2, "p", hold=False))[:2]
    assert gifts == [GiveSpan(2, 0, 0, keep=False), GiveSpan(2, 1, 1, keep=False)]


def test_what_was_given_never_goes() -> None:
    bench = Bench(2, window=2)
    bench.fill("a", 2, token=1)
    bench.know("b", 1)
    bench.tell(LeaseOpened(2, "a", hold=False))
    assert bench.tell(LeaseOpened(3, "b", hold=False)) == []
    assert bench.tell(SpansReleased(2, (1,))) == [DropSpan("a", 1, 1), StartRead("b", 0, 1, is_urgent=True)]


def test_a_lease_that_waits_does_not_hold_up_others() -> None:
    bench = Bench(2)
    bench.fill("a", 2, token=1)
    bench.know("b", 1)
    bench.tell(LeaseOpened(2, "a", hold=False), LeaseOpened(3, "b", hold=False))
    assert bench.tell(LeaseOpened(4, "a", hold=False)) == [GiveSpan(4, 0, 0, keep=False), GiveSpan(4, 1, 1, keep=False)]


def test_the_first_lease_gets_the_first_slot() -> None:
    bench = Bench(1)
    for name in "abc":
        bench.know(name, 1)
    bench.tell(LeaseOpened(1, "a", hold=False), ReadDone("a", 0, 0))
    assert bench.tell(LeaseOpened(2, "b", hold=False), LeaseOpened(3, "c", hold=False)) == []
    assert bench.tell(LeaseClosed(1)) == [DropSpan("a", 0, 0), StartRead("b", 0, 0, is_urgent=True)]


def test_what_a_load_still_wants_goes_for_the_next_span_of_another() -> None:
    bench = Bench(3, window=1)
    bench.fill("a", 3, token=1)
    bench.know("b", 2)
    bench.tell(LeaseOpened(2, "a", hold=False))
    assert bench.tell(LeaseOpened(3, "b", hold=False)) == [DropSpan("a", 2, 2), StartRead("b", 0, 2, is_urgent=True)]


def test_what_no_load_wants_goes_before_what_one_still_wants_even_if_dearer() -> None:
    bench = Bench(4, window=1)
    bench.fill("dear", 1, token=1, bps=0.1)
    bench.fill("a", 3, token=2)
    bench.know("b", 1)
    bench.tell(LeaseOpened(3, "a", hold=False))
    assert bench.tell(LeaseOpened(4, "b", hold=False))[0] == DropSpan("dear", 0, 0)


def test_what_a_load_still_wants_does_not_go_for_reading_ahead() -> None:
    bench = Bench(4, window=1)
    bench.fill("a", 4, token=1)
    bench.know("b", 2)
    bench.tell(LeaseOpened(2, "a", hold=False))
    assert bench.tell(LeaseOpened(3, "b", hold=False)) == [DropSpan("a", 3, 3), StartRead("b", 0, 3, is_urgent=True)]


def test_what_was_dropped_before_its_load_came_to_it_is_read_again() -> None:
    bench = Bench(3, window=1)
    bench.fill("a", 3, token=1)
    bench.know("b", 1)
    bench.tell(LeaseOpened(2, "a", hold=False), LeaseOpened(3, "b", hold=False), ReadDone("b", 0, 2))
    assert bench.tell(LeaseClosed(3)) == [DropSpan("b", 0, 2), StartRead("a", 2, 2, is_urgent=True)]


def test_the_very_span_a_load_waits_for_does_not_go() -> None:
    bench = Bench(2, window=1)
    bench.fill("a", 2, token=1)
    bench.know("b", 1)
    bench.tell(LeaseOpened(2, "a", hold=False))
    assert bench.tell(LeaseOpened(3, "b", hold=False)) == []


def test_reads_of_one_partition_are_bounded() -> None:
    bench = Bench(8, reads_max=2)
    bench.know("p", 4)
    assert len(bench.tell(LeaseOpened(1, "p", hold=False))) == 2
    assert bench.tell(ReadDone("p", 1, 1)) == [StartRead("p", 2, 2, is_urgent=True)]


def test_what_a_lease_has_behind_it_is_not_read_again() -> None:
    bench = Bench(8, reads_max=1)
    bench.know("p", 3)
    bench.tell(LeaseOpened(1, "p", hold=False), ReadDone("p", 0, 0), ReadDone("p", 1, 1))
    bench.tell(LeaseOpened(2, "p", hold=False), LeaseClosed(1), SpansReleased(2, (0, 1)), EvictAsked("p"))
    assert bench.tell(ReadDone("p", 2, 2)) == [GiveSpan(2, 2, 2, keep=False)]
