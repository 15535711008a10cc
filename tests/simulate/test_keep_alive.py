"""The keep-alive rule beside fixed ones on drawn patterns: fewer cold starts at no more idle seconds."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from sllm_vllm.router.core.keep_alive import DEFAULT_LIMITS, KeepAliveLimits
from sllm_vllm.simulate.keep_alive import PATTERNS, Cost, arrivals_of, hourly, replay
from tests.support.cases import every_case

STARTUP_S = 20.0
HOURS = 24.0
SEEDS = 5


def cost_of(pattern: str, *, fixed_s: float | None = None, limits: KeepAliveLimits = DEFAULT_LIMITS) -> Cost:
    arrivals = (arrivals_of(PATTERNS[pattern], HOURS, seed) for seed in range(SEEDS))
    return sum((replay(one, startup_s=STARTUP_S, fixed_s=fixed_s, limits=limits) for one in arrivals), Cost())


@every_case("pattern", PATTERNS)
def test_patterns_are_times_in_order_and_the_same_for_a_seed(pattern: str) -> None:
    times = arrivals_of(PATTERNS[pattern], 4.0, 1)
    assert all(first <= second for first, second in pairwise(times))
    assert times == arrivals_of(PATTERNS[pattern], 4.0, 1) != arrivals_of(PATTERNS[pattern], 4.0, 2)


def test_a_replay_counts_cold_starts_and_idle_seconds() -> None:
    times = [0.0, 30.0, 300.0]
    assert replay(times, startup_s=20.0, fixed_s=60.0) == Cost(2, 7.0 + 60.0)
    assert replay(times, startup_s=20.0, fixed_s=600.0) == Cost(1, 7.0 + 267.0)
    assert replay(times, startup_s=20.0) == Cost(1, 7.0 + 267.0)
    assert replay([], startup_s=20.0) == Cost()


def test_an_hourly_job_costs_as_many_starts_as_five_minutes_and_half_the_idling() -> None:
    assert next(hourly(random.Random(0))) < 5.0
    ours, fixed = cost_of("hourly"), cost_of("hourly", fixed_s=300.0)
    assert ours.num_cold == fixed.num_cold
    assert ours.idle_s < fixed.idle_s / 2


@every_case("fixed_s, idle_worth", [(300.0, 30.0), (600.0, 43.0)])
def test_over_all_patterns_there_are_fewer_cold_starts_at_no_more_idle_seconds(
    fixed_s: float, idle_worth: float
) -> None:
    limits = replace(DEFAULT_LIMITS, idle_worth=idle_worth)
    ours = sum((cost_of(pattern, limits=limits) for pattern in PATTERNS), Cost())
    fixed = sum((cost_of(pattern, fixed_s=fixed_s) for pattern in PATTERNS), Cost())
    assert ours.num_cold < fixed.num_cold
    assert ours.idle_s <= fixed.idle_s
