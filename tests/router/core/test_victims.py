"""Which idle replicas are stopped for slots."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.router.core.placement import Victim, choose_victims

costs = st.integers(0, 6).map(lambda quarters: quarters / 4)  # sums of these are exact


@st.composite
def several_victims(draw: st.DrawFn) -> list[Victim]:
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=7))
    return [Victim(name, draw(st.integers(1, 4)), draw(costs)) for name in names]


def best_by_trying_all(idle: list[Victim], needed: int) -> tuple[str, ...] | None:
    choices = [some for num in range(len(idle) + 1) for some in combinations(sorted(idle), num)]
    enough = [
        (sum(v.cost for v in some), sum(v.num_slots for v in some), len(some), tuple(v.id for v in some))
        for some in choices
        if sum(v.num_slots for v in some) >= needed
    ]
    return min(enough)[3] if enough else None


@given(several_victims(), st.integers(0, 12))
def test_choice_is_the_best_of_all(idle: list[Victim], needed: int) -> None:
    assert choose_victims(idle, needed) == best_by_trying_all(idle, needed)


@given(several_victims(), st.integers(0, 8))
def test_order_of_the_victims_changes_nothing(idle: list[Victim], needed: int) -> None:
    assert choose_victims(idle[::-1], needed) == choose_victims(idle, needed)


def test_nothing_needed_stops_nobody() -> None:
    assert choose_victims([Victim("a", 1, 0.0)], 0) == ()


def test_too_few_slots_are_no_choice() -> None:
    assert choose_victims([Victim("a", 1, 0.0), Victim("b", 2, 0.0)], 4) is None
    assert choose_victims([], 1) is None


def test_one_large_is_stopped_if_two_small_ones_cost_more() -> None:
    idle = [Victim("small-1", 1, 2.0), Victim("small-2", 1, 2.0), Victim("large", 4, 3.0)]
    assert choose_victims(idle, 2) == ("large",)


def test_of_equal_cost_the_one_that_frees_less_goes() -> None:
    assert choose_victims([Victim("a", 4, 1.0), Victim("b", 2, 1.0)], 2) == ("b",)
    assert choose_victims([Victim("a", 4, 1.0), Victim("b", 2, 1.0)], 1) == ("b",)


def test_of_equal_cost_and_slots_fewer_go() -> None:
    idle = [Victim("a", 1, 0.5), Victim("b", 1, 0.5), Victim("c", 2, 1.0)]
    assert choose_victims(idle, 2) == ("c",)


def test_equals_go_by_id() -> None:
    assert choose_victims([Victim(name, 1, 1.0) for name in "cab"], 2) == ("a", "b")
