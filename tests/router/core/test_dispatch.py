"""Which replica gets a request."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.cluster import Replica, choose_replica

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def replica(name: str, num_ongoing: int, **prefixes: float) -> Replica:
    ongoing = {f"{name}-{index}" for index in range(num_ongoing)}
    return Replica(name, "m", "n", ongoing=ongoing, prefixes=prefixes)


def chosen(*candidates: Replica, prefix: str = "p") -> str | None:
    found = choose_replica(candidates, prefix)
    return None if found is None else found.id


def test_the_one_with_the_fewest_requests() -> None:
    assert chosen(replica("a", 3), replica("b", 1), replica("c", 2)) == "b"


def test_of_equals_the_first_id() -> None:
    assert chosen(replica("b", 1), replica("a", 1), replica("c", 1)) == "a"


def test_one_request_more_is_worth_a_prefix() -> None:
    assert chosen(replica("a", 1), replica("b", 2, p=5.0)) == "b"


def test_two_requests_more_are_not() -> None:
    assert chosen(replica("a", 1), replica("b", 3, p=5.0)) == "a"


def test_the_prefix_that_was_seen_last() -> None:
    assert chosen(replica("a", 1, p=5.0), replica("b", 2, p=7.0), replica("c", 1, p=6.0)) == "b"


def test_of_equal_prefixes_the_one_with_fewer_requests() -> None:
    assert chosen(replica("a", 2, p=5.0), replica("b", 1, p=5.0)) == "b"


def test_an_empty_prefix_is_in_no_cache() -> None:
    marked = replica("b", 2)
    marked.prefixes[""] = 5.0
    assert chosen(replica("a", 1), marked, prefix="") == "a"


def test_another_prefix_says_nothing() -> None:
    assert chosen(replica("a", 1), replica("b", 2, q=5.0)) == "a"


def test_nobody_if_there_is_nobody() -> None:
    assert chosen() is None


@on_any_machine
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.dictionaries(st.sampled_from("pq"), st.floats(0, 10))), min_size=1, max_size=8
    ),
    st.randoms(use_true_random=False),
)
def test_order_of_the_candidates_does_not_matter_and_the_choice_is_among_the_least(
    entries: list[tuple[int, dict[str, float]]], random: Random
) -> None:
    candidates = [replica(f"r{index}", num, **seen) for index, (num, seen) in enumerate(entries)]
    first = choose_replica(candidates, "p")
    random.shuffle(candidates)
    assert choose_replica(candidates, "p") is first
    assert first is not None
    assert len(first.ongoing) <= min(num for num, _ in entries) + 1
