"""How long an idle replica is worth its memory, and what evicting it would cost. Pure; called by the router's core.

Arrivals closer together than a start or a request takes form one *burst*; the keep-alive of an idle replica depends on
the *pauses* between bursts. A replica that idles through a pause costs ``share`` of its node's accelerators for that
long; one that was stopped before costs a start. A second of starting is worth ``idle_worth`` seconds of idling on a
whole node, so idling longer than ``idle_worth * startup / share`` never pays (RainbowCake's beta, Yu et al., 2024).

Until ``pauses_min`` pauses have been seen, a replica stays that long: by the ski-rental argument this never costs more
than twice the best choice. After that it stays for the time that would have cost least over the last pauses, but at
least ``floor_startups`` times its startup. Before that it ends only if another start needs its slots and evicts it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log

from sllm_vllm.router.core.facts import ModelSpec

DOWN_DELAY_S = 30.0


@dataclass(slots=True)
class AutoscaleState:
    """What is remembered about one model between two calls."""

    down_delay_s: float = DOWN_DELAY_S
    lower_since_s: float | None = None
    """Since when fewer replicas would have been enough; None if all are needed."""
    num_needed: int = 0
    """The most replicas needed since then."""


def desired_replicas(
    spec: ModelSpec, *, ongoing: int, waiting: int, num_now: int, now_s: float, state: AutoscaleState
) -> int:
    """Return the number of replicas the model should have for its current load.

    Scales up at once, because requests are waiting. Scales down only after fewer replicas have been enough for
    ``DOWN_DELAY_S``, and then to the most that were needed during that time. The last replica is never removed here: it
    idles, and keep-alive decides when it ends.

    ``num_now`` counts the replicas that take requests or will once they are ready, not those that drain or stop.
    """
    wish = _wish(spec, num_requests=ongoing + waiting, num_now=num_now)
    if wish >= num_now:
        state.lower_since_s = None
        return wish
    if state.lower_since_s is None:
        state.lower_since_s, state.num_needed = now_s, wish
    state.num_needed = max(state.num_needed, wish)
    if now_s - state.lower_since_s < state.down_delay_s:
        return min(num_now, spec.max_replicas)
    needed = min(state.num_needed, num_now)  # replicas may have died since
    state.lower_since_s, state.num_needed = now_s, wish  # restart the delay for the next step down
    return min(needed, spec.max_replicas)


def _wish(spec: ModelSpec, *, num_requests: int, num_now: int) -> int:
    """Return the number needed now, without the delay. ``max_replicas`` overrides everything else."""
    assert spec.target_ongoing >= 1, "a replica has at least one request at once"
    enough = -(-num_requests // spec.target_ongoing)
    return min(max(enough, spec.min_replicas, min(num_now, 1)), spec.max_replicas)


ARRIVALS_MAX = 6
PAUSES_MAX = 16


@dataclass(frozen=True, slots=True)
class KeepAliveLimits:
    """Parameters of the rule; measurements are in ``benchmarks/results/README.md`` (Keep-alive)."""

    idle_worth: float = 22.0
    """Seconds of idling on all of a node's accelerators that one second of starting is worth."""
    floor_startups: float = 2.0
    """Minimum stay of an idle replica, in startup times."""
    idle_s_min: float = 5.0
    """Minimum stay; overrides everything else, so that a replica is not stopped between two turns of a conversation."""
    idle_s_max: float = 3600.0
    pauses_min: int = 3
    """Pauses that must have been seen before they decide."""
    margin: float = 1.25
    """Factor on a pause, as the next one like it may be that much longer."""
    slack: float = 0.05
    """Of two times whose costs differ by less than this share, the longer one is taken."""
    first_gap_s: float = 300.0
    """Assumed mean gap of a model that got at most one request."""

    def bound_s(self, startup_s: float, share: float) -> float:
        """Return the idle time that costs as much as the start it can save; ``share`` in (0, 1]."""
        assert share > 0, "a replica holds something"
        return self.idle_worth * startup_s / share


DEFAULT_LIMITS = KeepAliveLimits()


class Arrivals:
    """One model's last few arrivals, and the last pauses between its bursts.

    An arrival earlier than the previous one counts as being at the previous one's time.
    """

    __slots__ = ("_pauses", "_times")

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=ARRIVALS_MAX)
        self._pauses: deque[float] = deque(maxlen=PAUSES_MAX)

    def note(self, now_s: float, *, together_s: float = 0.0) -> None:
        """Record an arrival. ``together_s``: arrivals no farther apart than this belong to one burst."""
        if self._times and now_s - self._times[-1] > together_s:
            self._pauses.append(now_s - self._times[-1])
        self._times.append(max(now_s, self._times[-1]) if self._times else now_s)

    @property
    def pauses_s(self) -> tuple[float, ...]:
        """Pauses between the last bursts, oldest first."""
        return tuple(self._pauses)

    def next_burst_s(self, p: float) -> float | None:
        """Return the seconds after the last arrival within which the next burst begins with probability ``p``.

        ``p`` is in [0, 1); bursts are assumed to be a Poisson process. None before the second burst.
        """
        return -sum(self._pauses) / len(self._pauses) * log(1 - p) if self._pauses else None

    @property
    def last_s(self) -> float | None:
        """When the last request arrived; None if there was none."""
        return self._times[-1] if self._times else None

    def silence_s(self, now_s: float) -> float:
        """Return the seconds since the last arrival; 0 if there was none."""
        return max(0.0, now_s - self._times[-1]) if self._times else 0.0

    def mean_gap_s(self, now_s: float) -> float | None:
        """Return the mean gap between arrivals; None before the second arrival.

        The silence since the last arrival is included once it is longer than the mean.
        """
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
    """Return how long a replica may idle: longer for a longer startup, less for a larger ``share`` of its node."""
    bound_s = limits.bound_s(startup_s, share)
    longest_s = min(limits.idle_s_max, bound_s)
    shortest_s = max(limits.idle_s_min, min(longest_s, limits.floor_startups * startup_s))
    pauses_s = sorted(arrivals.pauses_s)
    if len(pauses_s) < limits.pauses_min:
        return max(shortest_s, longest_s)
    return max(shortest_s, _cheapest_s(pauses_s, longest_s, start_cost_s=bound_s, limits=limits))


def _cheapest_s(pauses_s: list[float], longest_s: float, *, start_cost_s: float, limits: KeepAliveLimits) -> float:
    """Return the stay that would have cost least over ``pauses_s``, which are sorted; of near ties the longest.

    A stay of t costs the length of each pause shorter than t, and t plus a start for each of the others. So only 0,
    times just after a pause, and ``longest_s`` can be best.
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
    """Return the startup time that evicting a replica now is expected to cost.

    That is ``startup_s`` times the probability of another request within the idle bound of a whole node.
    """
    gap_s = _gap_s(arrivals, now_s, limits)
    horizon_s = limits.bound_s(startup_s, 1.0)
    return startup_s * (1 - exp(-horizon_s / gap_s)) if gap_s > 0 else startup_s


def _gap_s(arrivals: Arrivals, now_s: float, limits: KeepAliveLimits) -> float:
    """Return the mean gap, or a guess before the second arrival."""
    mean_s = arrivals.mean_gap_s(now_s)
    return max(limits.first_gap_s, arrivals.silence_s(now_s)) if mean_s is None else mean_s
