"""How long an idle replica is worth its memory, and what evicting it would cost. Pure; asked by the router's core.

Arrivals closer to each other than a start or a request takes are one *burst*; what decides about an idle replica are
the *pauses* between bursts. A replica that idles through a pause costs ``share`` of its node's accelerators for that
long; one that was stopped before costs a start. A second of starting is worth ``idle_worth`` seconds of idling on a
whole node, so idling longer than ``idle_worth * startup / share`` never pays (RainbowCake's beta, Yu et al., 2024).

Until ``pauses_min`` pauses were seen a replica stays that long: by the ski-rental argument it never costs more than
twice the best choice. After that it stays as long as would have cost least over the last pauses, and never less than
``floor_startups`` times its start. Whoever needs its slots evicts it before that; nothing else ends it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log

ARRIVALS_MAX = 6
PAUSES_MAX = 16


@dataclass(frozen=True, slots=True)
class KeepAliveLimits:
    """What the rule is tuned with; figures in ``benchmarks/results/README.md`` (Keep-alive)."""

    idle_worth: float = 22.0
    """Seconds of idling on all of a node's accelerators that one second of starting is worth."""
    floor_startups: float = 2.0
    """Startup times that an idle replica stays at least."""
    idle_s_min: float = 5.0
    """Goes before all else: a replica is not stopped between two turns."""
    idle_s_max: float = 3600.0
    pauses_min: int = 3
    """Seen before they are believed."""
    margin: float = 1.25
    """Of a pause: the next one like it may be that much longer."""
    slack: float = 0.05
    """Of two times whose costs differ by less the longer one is taken."""
    first_gap_s: float = 300.0
    """Taken for the mean gap of a model that was asked at most once."""

    def bound_s(self, startup_s: float, share: float) -> float:
        """When idling has cost what it can save; ``share`` in (0, 1]."""
        assert share > 0, "a replica holds something"
        return self.idle_worth * startup_s / share


DEFAULT_LIMITS = KeepAliveLimits()


class Arrivals:
    """When one model was asked last, a few times, and the last pauses between bursts. A time before the last one counts
    as the last one."""

    __slots__ = ("_pauses", "_times")

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=ARRIVALS_MAX)
        self._pauses: deque[float] = deque(maxlen=PAUSES_MAX)

    def note(self, now_s: float, *, together_s: float = 0.0) -> None:
        """It was asked. ``together_s``: arrivals that are no farther apart are one burst."""
        if self._times and now_s - self._times[-1] > together_s:
            self._pauses.append(now_s - self._times[-1])
        self._times.append(max(now_s, self._times[-1]) if self._times else now_s)

    @property
    def pauses_s(self) -> tuple[float, ...]:
        """Between the last bursts, the oldest first."""
        return tuple(self._pauses)

    def next_burst_s(self, p: float) -> float | None:
        """Seconds after the last arrival within which the next burst begins with probability ``p``, in [0, 1), if
        bursts are Poisson; None before the second one."""
        return -sum(self._pauses) / len(self._pauses) * log(1 - p) if self._pauses else None

    @property
    def last_s(self) -> float | None:
        """When it was asked last."""
        return self._times[-1] if self._times else None

    def silence_s(self, now_s: float) -> float:
        """Since the last arrival; 0 if there was none."""
        return max(0.0, now_s - self._times[-1]) if self._times else 0.0

    def mean_gap_s(self, now_s: float) -> float | None:
        """Between arrivals; None before the second. The silence since the last counts once it is longer than that."""
        num_gaps = len(self._times) - 1
        if num_gaps < 1:
            return None
        passed_s = self._times[-1] - self._times[0]
        mean_s = passed_s / num_gaps
        silence_s = self.silence_s(now_s)
        return (passed_s + silence_s) / (num_gaps + 1) if silence_s > mean_s else mean_s


def keep_alive_s(
    arrivals: Arrivals, *, startup_s: float, share: float, limits: KeepAliveLimits = DEFAULT_LIMITS
) -> float:
    """How long a replica may idle; more for a longer startup, less for a larger ``share`` of its node."""
    bound_s = limits.bound_s(startup_s, share)
    longest_s = min(limits.idle_s_max, bound_s)
    shortest_s = max(limits.idle_s_min, min(longest_s, limits.floor_startups * startup_s))
    pauses_s = sorted(arrivals.pauses_s)
    if len(pauses_s) < limits.pauses_min:
        return max(shortest_s, longest_s)
    return max(shortest_s, _cheapest_s(pauses_s, longest_s, start_cost_s=bound_s, limits=limits))


def _cheapest_s(pauses_s: list[float], longest_s: float, *, start_cost_s: float, limits: KeepAliveLimits) -> float:
    """The time that would have cost least over ``pauses_s``, which are sorted; of those about as cheap the longest.

    Staying t costs the pauses that are shorter than t, and t and a start for each of the others; so only 0, times just
    after a pause and the longest one can be best.
    """
    num = len(pauses_s)
    short_s = [pause_s for pause_s in pauses_s if pause_s <= longest_s]
    costs = {0.0: num * start_cost_s}
    for index, (pause_s, sum_s) in enumerate(zip(short_s, accumulate(short_s), strict=True), 1):
        stay_s = min(longest_s, limits.margin * pause_s)
        costs[stay_s] = sum_s + (num - index) * (stay_s + start_cost_s)
    costs[longest_s] = sum(short_s) + (num - len(short_s)) * (longest_s + start_cost_s)
    most = (1 + limits.slack) * min(costs.values())
    return max(stay_s for stay_s, cost in costs.items() if cost <= most)


def keep_value_s(
    arrivals: Arrivals, *, startup_s: float, now_s: float, limits: KeepAliveLimits = DEFAULT_LIMITS
) -> float:
    """The startup that evicting it now is expected to cost: T, if it is asked again within a whole node's bound."""
    gap_s = _gap_s(arrivals, now_s, limits)
    horizon_s = limits.bound_s(startup_s, 1.0)
    return startup_s * (1 - exp(-horizon_s / gap_s)) if gap_s > 0 else startup_s


def _gap_s(arrivals: Arrivals, now_s: float, limits: KeepAliveLimits) -> float:
    """The mean gap, guessed where there is none."""
    mean_s = arrivals.mean_gap_s(now_s)
    return max(limits.first_gap_s, arrivals.silence_s(now_s)) if mean_s is None else mean_s
