"""How long idle replicas stay, what they are worth, and when one is fetched ahead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import exp, log

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.router.core.keep_alive import (
    ARRIVALS_MAX,
    DEFAULT_LIMITS,
    Arrivals,
    keep_alive_s,
    keep_value_s,
    wants_prefetch,
)

on_any_machine = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LIMITS = replace(DEFAULT_LIMITS, idle_s_min=0.0, idle_s_max=1e9)
TIMES = st.lists(st.floats(0, 1e5), max_size=10).map(sorted)
STARTUPS = st.floats(0, 300)
SHARES = st.floats(0.01, 1)
LATER = st.floats(0, 1e5)


def arrived(times_s: Iterable[float]) -> Arrivals:
    arrivals = Arrivals()
    for time_s in times_s:
        arrivals.note(time_s)
    return arrivals


# ---------------------------------------------------------------------------------------------------------- arrivals


def test_before_the_second_arrival_there_is_no_gap() -> None:
    assert arrived([]).mean_gap_s(9.0) is None
    assert arrived([3.0]).mean_gap_s(9.0) is None
    assert [arrived([]).last_s, arrived([3.0]).last_s] == [None, 3.0]
    assert arrived([3.0]).next_after_s(9.0, 0.8) is None


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


def test_next_arrival_is_within_the_quantile_of_the_exponential() -> None:
    after_s = arrived([0.0, 10.0]).next_after_s(10.0, 0.8)
    assert after_s == pytest.approx(-10 * log(0.2))


# -------------------------------------------------------------------------------------------------------- keep-alive


def test_frequent_model_is_kept_until_the_next_arrival_is_likely_past() -> None:
    kept_s = keep_alive_s(arrived([0.0, 10.0]), startup_s=20.0, share=1.0, now_s=10.0)
    assert kept_s == pytest.approx(16.09, abs=0.01)


@pytest.mark.parametrize(("share", "expected_s"), [(1.0, 300.0), (0.5, 600.0), (0.125, 2400.0), (0.01, 3600.0)])
def test_rare_model_is_kept_no_longer_than_it_is_worth(share: float, expected_s: float) -> None:
    kept_s = keep_alive_s(arrived([0.0, 1e5]), startup_s=20.0, share=share, now_s=1e5)
    assert kept_s == pytest.approx(expected_s)


def test_no_replica_is_stopped_at_once() -> None:
    assert keep_alive_s(arrived([1.0, 1.0]), startup_s=20.0, share=1.0, now_s=1.0) == DEFAULT_LIMITS.idle_s_min
    assert keep_alive_s(arrived([0.0, 1e5]), startup_s=0.0, share=1.0, now_s=1e5) == DEFAULT_LIMITS.idle_s_min


@pytest.mark.parametrize("times_s", [[], [100.0]])
def test_model_that_was_asked_at_most_once_is_thought_to_be_asked_again(times_s: list[float]) -> None:
    kept_s = keep_alive_s(arrived(times_s), startup_s=20.0, share=0.1, now_s=100.0)
    assert kept_s == pytest.approx(-300 * log(0.2))


@on_any_machine
@given(TIMES, LATER, STARTUPS, STARTUPS, SHARES)
def test_longer_startup_is_kept_no_shorter(
    times_s: list[float], now_s: float, startup_s: float, more_s: float, share: float
) -> None:
    arrivals = arrived(times_s)
    short_s, long_s = (
        keep_alive_s(arrivals, startup_s=seconds, share=share, now_s=now_s, limits=LIMITS)
        for seconds in (startup_s, startup_s + more_s)
    )
    assert 0 <= short_s <= long_s


@on_any_machine
@given(TIMES, LATER, STARTUPS, SHARES, SHARES)
def test_larger_share_is_kept_no_longer(
    times_s: list[float], now_s: float, startup_s: float, share: float, other: float
) -> None:
    arrivals = arrived(times_s)
    small_s, large_s = (
        keep_alive_s(arrivals, startup_s=startup_s, share=held, now_s=now_s, limits=LIMITS)
        for held in sorted((share, other))
    )
    assert small_s >= large_s
    assert large_s <= LIMITS.beta_s(startup_s, max(share, other))


def test_model_that_was_asked_once_long_ago_is_thought_to_be_rare() -> None:
    once = arrived([0.0])
    assert keep_value_s(once, startup_s=20.0, now_s=3000.0) == pytest.approx(20 * (1 - exp(-0.1)))
    assert keep_alive_s(once, startup_s=20.0, share=0.01, now_s=1000.0) == pytest.approx(-1000 * log(0.2))


# ------------------------------------------------------------------------------------------------- value and prefetch


def test_value_is_the_startup_times_the_chance_that_it_is_needed() -> None:
    value_s = keep_value_s(arrived([0.0, 600.0]), startup_s=20.0, now_s=600.0)
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


@pytest.mark.parametrize(
    ("times_s", "lead_s", "expected"),
    [([], 1e9, False), ([0.0], 1e9, False), ([0.0, 10.0], 16.0, False), ([0.0, 10.0], 16.1, True)],
)
def test_prefetch_is_wanted_when_the_next_arrival_is_likely_within_the_lead(
    times_s: list[float], lead_s: float, expected: bool
) -> None:
    assert wants_prefetch(arrived(times_s), now_s=10.0, lead_s=lead_s) is expected
