"""Counts a model's cold starts and idle time under a keep-alive rule: one replica, alone on its node. Pure.

Arrival patterns are drawn here, seeded; a trace's arrivals may be given instead. The rule is the router's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

from sllm_vllm.router.core.keep_alive import DEFAULT_LIMITS, Arrivals, KeepAliveLimits, keep_alive_s
from sllm_vllm.simulate.workload import gaps

HOUR_S = 3600.0
Pattern = Callable[[random.Random], Iterator[float]]
"""Yields one model's arrival times, ascending and without end."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cold starts and idle time of one or several models."""

    num_cold: int = 0
    idle_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_cold + other.num_cold, self.idle_s + other.idle_s)


def chat_pairs(rng: random.Random) -> Iterator[float]:
    """Conversations of up to 8 turns, a minute apart; 25 minutes between them. The first turn also requests a title."""
    at_s = rng.uniform(0, 300)
    while True:
        for turn in range(rng.randint(1, 8)):
            yield at_s
            if not turn:
                yield at_s + 1.0
            at_s += 2.0 + rng.lognormvariate(log(60), 1.0)
        at_s += rng.expovariate(1 / 1500)


def agent_bursts(rng: random.Random) -> Iterator[float]:
    """Bursts of twenty calls, each a few seconds after the last; about seven minutes between bursts."""
    at_s = rng.uniform(0, 300)
    while True:
        for _ in range(20):
            yield at_s
            at_s += 3.0 + rng.expovariate(0.5)
        at_s += rng.lognormvariate(log(420), 0.8)


def hourly(rng: random.Random) -> Iterator[float]:
    """Three calls every hour."""
    for hour in itertools.count():
        begin_s = hour * HOUR_S + rng.uniform(0, 5)
        yield from (begin_s, begin_s + 2.0, begin_s + 4.0)


def bursty(rng: random.Random) -> Iterator[float]:
    """Gamma gaps of CV 8, as in AlpaServe's and ServerlessLLM's evaluations; one request in two minutes on average."""
    return gaps(1 / 120, 8.0, rng)


PATTERNS: Mapping[str, Pattern] = {
    "chat pairs": chat_pairs,
    "agents' bursts of 20": agent_bursts,
    "hourly": hourly,
    "bursty": bursty,
}


def arrivals_of(pattern: Pattern, hours: float, seed: int) -> list[float]:
    """A pattern's arrivals in the first ``hours``."""
    times = pattern(random.Random(f"keep-alive {seed}"))
    return list(itertools.takewhile(lambda at_s: at_s < hours * HOUR_S, times))


def replay(
    times_s: Sequence[float],
    *,
    startup_s: float,
    service_s: float = 3.0,
    fixed_s: float | None = None,
    limits: KeepAliveLimits = DEFAULT_LIMITS,
) -> Cost:
    """Replay arrivals on one model that has a whole node; time after the last arrival is not counted.

    Args:
        fixed_s: the keep-alive; None: the router's rule with ``limits``.
    """
    arrivals, together_s = Arrivals(), max(startup_s, service_s)
    num_cold, idle_s = 0, 0.0
    busy_until_s: float | None = None
    for at_s in times_s:
        begins_s = at_s
        if busy_until_s is None or at_s > busy_until_s:
            stay_s = fixed_s
            if stay_s is None:
                stay_s = keep_alive_s(arrivals, startup_s=startup_s, share=1.0, limits=limits)
            pause_s = float("inf") if busy_until_s is None else at_s - busy_until_s
            if pause_s > stay_s:
                num_cold += 1
                begins_s += startup_s
            idle_s += 0.0 if busy_until_s is None else min(pause_s, stay_s)
        arrivals.note(at_s, together_s=together_s)
        busy_until_s = max(busy_until_s or 0.0, begins_s + service_s)
    return Cost(num_cold, idle_s)
