"""Which partition goes first."""

from __future__ import annotations

import pytest

from sllm_vllm.store.core.policy import CostAware, EvictionPolicy, Lru, Usage, policy_named
from tests.support.cases import every_case


def used(policy: EvictionPolicy, *, span_s: float = 1.0, uses: int = 1, now_s: float = 0.0) -> Usage:
    usage = Usage(span_s, uses=uses)
    policy.touch(usage, now_s)
    return usage


def test_cost_values_what_is_slow_to_get_back() -> None:
    policy = CostAware()
    assert policy.worth(used(policy, span_s=3.0)) > policy.worth(used(policy, span_s=1.0))


def test_cost_values_what_is_used_often() -> None:
    policy = CostAware()
    assert policy.worth(used(policy, uses=5)) == 5.0


def test_cost_values_what_is_expected_like_what_was_used_once() -> None:
    policy = CostAware()
    assert policy.worth(used(policy, uses=0)) == policy.worth(used(policy, uses=1))


def test_cost_lets_what_is_not_used_grow_cheap() -> None:
    policy = CostAware()
    old = used(policy, uses=3)
    policy.evicted(4.0)
    assert policy.worth(used(policy, uses=1)) > policy.worth(old)


def test_cost_never_lowers_its_floor() -> None:
    policy = CostAware()
    policy.evicted(4.0)
    policy.evicted(1.0)
    assert policy.worth(used(policy)) == 5.0


def test_lru_values_what_was_used_last() -> None:
    policy = Lru()
    policy.evicted(9.0)
    assert policy.worth(used(policy, now_s=2.0)) > policy.worth(used(policy, now_s=1.0, uses=9))


def test_cost_keeps_a_head_and_lru_a_tail() -> None:
    assert (CostAware.tail_first, Lru.tail_first) == (True, False)


@every_case("name, kind", [("cost", CostAware), ("lru", Lru)])
def test_a_policy_has_a_name(name: str, kind: type) -> None:
    assert isinstance(policy_named(name), kind)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'fifo'; there are cost, lru"):
        policy_named("fifo")
