"""How long idle replicas stay, what they are worth, and when one is fetched ahead."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from math import exp, log

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.keep_alive import (
    ARRIVALS_MAX,
    DEFAULT_LIMITS,
    PAUSES_MAX,
    Arrivals,
    keep_alive_s,
    keep_value_s,
)
from tests.support.cases import every_case

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LIMITS = replace(DEFAULT_LIMITS, idle_s_min=0.0, idle_s_max=1e9)
TIMES = st.lists(st.floats(0, 1e5), max_size=10).map(sorted)
STARTUPS = st.floats(0, 300)
SHARES = st.floats(0.01, 1)
LATER = st.floats(0, 1e5)


def arrived(times_s: Iterable[float], *, together_s: float = 0.0) -> Arrivals:
    arrivals = Arrivals()
    for time_s in times_s:
        arrivals.note(time_s, together_s=together_s)
    return arrivals


def paused(*pauses_s: float) -> Arrivals:
    """Bursts of three arrivals with these pauses between them."""
    ends_s = itertools.accumulate((one + 2.0 for one in pauses_s), initial=0.0)
    return arrived([end_s + more_s for end_s in ends_s for more_s in (0.0, 1.0, 2.0)], together_s=20.0)


# ---------------------------------------------------------------------------------------------------------- arrivals


def test_before_the_second_arrival_there_is_no_gap() -> None:
    assert arrived([]).mean_gap_s(9.0) is None
    assert arrived([3.0]).mean_gap_s(9.0) is None
    assert [arrived([]).last_s, arrived([3.0]).last_s] == [None, 3.0]
    assert arrived([3.0]).next_burst_s(0.8) is None


def test_gap_is_the_mean_of_the_last_six_arrivals() -> None:
    times_s = [0.0, 1000.0, 1001.0, 1003.0, 1004.0, 1006.0, 1010.0]
    assert len(times_s) == ARRIVALS_MAX + 1
    assert arrived(times_s).mean_gap_s(1010.0) == 2.0


def test_silence_counts_once_it_is_longer_than_the_mean() -> None:
    arrivals = arrived([0.0, 10.0, 20.0])
    assert arrivals.mean_gap_s(30.0) == 10.0
    assert arrivals.mean_gap_s(60.0) == 20.0
    assert [arrivals.silence_s(60.0), arrivals.silence_s(10.0)] == [40.0, 0.0]
    assert arrived([]).silence_s(60.0) == 0.0


@on_any_machine
@given(TIMES.filter(lambda times: len(times) > 1), LATER, LATER)
def test_gap_never_shrinks_while_it_is_silent(times_s: list[float], passed_s: float, more_s: float) -> None:
    arrivals, now_s = arrived(times_s), times_s[-1] + passed_s
    sooner_s, later_s = arrivals.mean_gap_s(now_s), arrivals.mean_gap_s(now_s + more_s)
    assert sooner_s is not None
    assert later_s is not None
    assert later_s >= sooner_s * (1 - 1e-9)


def test_time_that_goes_back_counts_as_no_time() -> None:
    assert arrived([10.0, 20.0, 5.0]).mean_gap_s(20.0) == 5.0


def test_arrivals_close_to_each_other_are_one_burst() -> None:
    assert paused(600.0, 30.0).pauses_s == (600.0, 30.0)
    assert list(arrived([0.0, 20.0, 40.1], together_s=20.0).pauses_s) == pytest.approx([20.1])
    assert len(paused(*[60.0] * (PAUSES_MAX + 1)).pauses_s) == PAUSES_MAX


def test_next_burst_is_within_the_quantile_of_the_exponential() -> None:
    assert paused(10.0).next_burst_s(0.8) is None
    assert paused(300.0, 100.0).next_burst_s(0.8) == pytest.approx(-200 * log(0.2))


# -------------------------------------------------------------------------------------------------------- keep-alive


@every_case("times_s", [[], [100.0], [100.0 + one for one in range(7)], [0.0, 1.0, 600.0, 601.0]])
@every_case("share, expected_s", [(1.0, 440.0), (0.5, 880.0), (0.01, 3600.0)])
def test_until_pauses_are_known_a_replica_stays_as_long_as_it_may_be_worth(
    times_s: list[float], share: float, expected_s: float
) -> None:
    kept_s = keep_alive_s(arrived(times_s, together_s=20.0), startup_s=20.0, share=share)
    assert kept_s == pytest.approx(expected_s)


def test_a_burst_keeps_a_replica_no_shorter_than_one_request() -> None:
    once, twice = arrived([0.0], together_s=60.0), arrived([0.0, 1.0], together_s=60.0)
    assert keep_alive_s(twice, startup_s=60.0, share=1.0) == keep_alive_s(once, startup_s=60.0, share=1.0) == 1320.0


def test_pauses_that_come_again_are_waited_for_with_a_margin() -> None:
    assert keep_alive_s(paused(200.0, 190.0, 200.0, 7200.0), startup_s=20.0, share=1.0) == 250.0


def test_a_rare_long_pause_is_not_waited_for() -> None:
    assert keep_alive_s(paused(100.0, 100.0, 7200.0, 100.0), startup_s=20.0, share=1.0) == 125.0


@every_case("startup_s, expected_s", [(20.0, 40.0), (60.0, 120.0), (1.0, 5.0)])
def test_pauses_too_long_to_be_worth_it_leave_the_floor(startup_s: float, expected_s: float) -> None:
    assert keep_alive_s(paused(3600.0, 3600.0, 3600.0), startup_s=startup_s, share=1.0) == expected_s


@on_any_machine
@given(TIMES, STARTUPS, STARTUPS, SHARES)
def test_longer_startup_is_kept_no_shorter(times_s: list[float], startup_s: float, more_s: float, share: float) -> None:
    arrivals = arrived(times_s)
    short_s, long_s = (
        keep_alive_s(arrivals, startup_s=seconds, share=share, limits=LIMITS)
        for seconds in (startup_s, startup_s + more_s)
    )
    assert 0 <= short_s <= long_s


@on_any_machine
@given(TIMES, STARTUPS, SHARES, SHARES)
def test_larger_share_is_kept_no_longer(times_s: list[float], startup_s: float, share: float, other: float) -> None:
    arrivals = arrived(times_s)
    small_s, large_s = (
        keep_alive_s(arrivals, startup_s=startup_s, share=held, limits=LIMITS) for held in sorted((share, other))
    )
    assert small_s >= large_s
    assert large_s <= LIMITS.bound_s(startup_s, max(share, other))


def test_model_that_was_asked_once_long_ago_is_thought_to_be_rare() -> None:
    once = arrived([0.0])
    assert keep_value_s(once, startup_s=20.0, now_s=4400.0) == pytest.approx(20 * (1 - exp(-0.1)))


# ------------------------------------------------------------------------------------------------------------- value


def test_value_is_the_startup_times_the_chance_that_it_is_needed() -> None:
    value_s = keep_value_s(arrived([0.0, 880.0]), startup_s=20.0, now_s=880.0)
    assert value_s == pytest.approx(20 * (1 - exp(-0.5)))


def test_value_of_a_model_asked_all_the_time_is_its_startup() -> None:
    assert keep_value_s(arrived([5.0, 5.0]), startup_s=20.0, now_s=5.0) == 20.0


@on_any_machine
@given(TIMES, LATER, LATER, STARTUPS)
def test_value_falls_with_silence_and_is_never_more_than_the_startup(
    times_s: list[float], now_s: float, more_s: float, startup_s: float
) -> None:
    arrivals = arrived(times_s)
    sooner_s, later_s = (
        keep_value_s(arrivals, startup_s=startup_s, now_s=time_s) for time_s in (now_s, now_s + more_s)
    )
    assert 0 <= later_s <= sooner_s * (1 + 1e-9) <= startup_s * (1 + 1e-8)


@on_any_machine
@given(TIMES, LATER, STARTUPS, STARTUPS)
def test_value_grows_with_the_startup(times_s: list[float], now_s: float, startup_s: float, more_s: float) -> None:
    arrivals = arrived(times_s)
    short_s, long_s = (
        keep_value_s(arrivals, startup_s=seconds, now_s=now_s) for seconds in (startup_s, startup_s + more_s)
    )
    assert short_s <= long_s
