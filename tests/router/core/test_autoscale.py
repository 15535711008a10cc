"""How many replicas are wanted: up at once, down after a while, never the last one."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.core.keep_alive import AutoscaleState, desired_replicas
from tests.support.cases import every_case

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPEC = ModelSpec("m", max_replicas=4, target_ongoing=8)


class Model:
    """One whose replicas come and go as is desired."""

    def __init__(self, spec: ModelSpec = SPEC, *, num_now: int = 0, down_delay_s: float = 30.0) -> None:
        self.spec = spec
        self.num_now = num_now
        self.state = AutoscaleState(down_delay_s)

    def ask(self, now_s: float, *, ongoing: int = 0, waiting: int = 0) -> int:
        self.num_now = desired_replicas(
            self.spec, ongoing=ongoing, waiting=waiting, num_now=self.num_now, now_s=now_s, state=self.state
        )
        return self.num_now


@every_case(
    "ongoing, waiting, expected",
    [(0, 0, 0), (0, 1, 1), (8, 0, 1), (8, 1, 2), (16, 0, 2), (9, 8, 3), (8, 1000, 4)],
)
def test_enough_for_what_is_asked_and_no_more_than_may_be(ongoing: int, waiting: int, expected: int) -> None:
    assert Model().ask(0.0, ongoing=ongoing, waiting=waiting) == expected


def test_no_fewer_than_must_be() -> None:
    assert Model(ModelSpec("m", min_replicas=2, max_replicas=4)).ask(0.0) == 2


def test_model_that_may_have_none_gets_none_though_somebody_waits() -> None:
    assert Model(ModelSpec("m", max_replicas=0)).ask(0.0, waiting=5) == 0


def test_more_than_may_be_are_given_up_at_once() -> None:
    assert Model(num_now=7).ask(0.0, ongoing=56) == 4
    assert Model(num_now=7).ask(0.0) == 4
    assert Model(ModelSpec("m", max_replicas=0), num_now=1).ask(0.0, ongoing=1) == 0


def test_last_replica_stays_however_long_it_idles() -> None:
    model = Model(num_now=1)
    assert [model.ask(now_s) for now_s in (0.0, 1e6)] == [1, 1]


def test_fewer_only_after_a_while() -> None:
    model = Model(num_now=4)
    assert [model.ask(now_s, ongoing=8) for now_s in (0.0, 29.9, 30.0)] == [4, 4, 1]


def test_a_moment_of_need_begins_the_while_anew() -> None:
    model = Model(num_now=4)
    model.ask(0.0, ongoing=8)
    assert model.ask(20.0, ongoing=32) == 4
    assert [model.ask(now_s, ongoing=8) for now_s in (25.0, 54.9, 55.0)] == [4, 4, 1]


def test_down_goes_to_the_most_that_were_needed_meanwhile_and_then_further() -> None:
    model = Model(num_now=4)
    model.ask(0.0, ongoing=8)
    model.ask(10.0, ongoing=24)
    assert [model.ask(now_s, ongoing=8) for now_s in (30.0, 59.9, 60.0)] == [3, 3, 1]


def test_replicas_that_died_meanwhile_do_not_come_back_for_a_need_that_is_past() -> None:
    model = Model(num_now=4)
    model.ask(0.0, ongoing=24)
    model.num_now = 2
    assert model.ask(30.0, ongoing=8) == 2


@on_any_machine
@given(
    min_replicas=st.integers(0, 3),
    more=st.integers(0, 5),
    steps=st.lists(st.tuples(st.floats(0, 60), st.integers(0, 100), st.integers(0, 100)), max_size=20),
)
def test_always_within_the_limits_and_never_short(
    min_replicas: int, more: int, steps: list[tuple[float, int, int]]
) -> None:
    spec = ModelSpec("m", min_replicas=min_replicas, max_replicas=min_replicas + more, target_ongoing=8)
    model, now_s = Model(spec), 0.0
    for passed_s, ongoing, waiting in steps:
        now_s += passed_s
        num_before = model.num_now
        num = model.ask(now_s, ongoing=ongoing, waiting=waiting)
        assert spec.min_replicas <= num <= spec.max_replicas
        assert num * 8 >= ongoing + waiting or num == spec.max_replicas
        assert num >= min(num_before, 1)
