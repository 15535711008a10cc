"""How long an idle replica is worth its memory, and what evicting it would cost. Pure; asked by the router's core.

RainbowCake's rule (Yu et al., ASPLOS 2024, as in its artifact): arrivals are taken as Poisson, their mean gap m is that
of the last six, so the next one comes within -m ln(1-p) with probability p. A thing is kept that long, but no longer
than beta = alpha T / ((1-alpha) M), where keeping it (M, its memory, times the idle time) has cost as much as the
startup T that it would save. There M is in MB and alpha 0.996, which for models of gigabytes makes fractions of a
second. Here M is the share of its node's accelerators that a replica holds, and alpha is 15/16, so beta = 15 T / M: a
model that fills its node and starts in 20 s may idle for 300 s.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import exp, log

ARRIVALS_MAX = 6


@dataclass(frozen=True, slots=True)
class KeepAliveLimits:
    """What the rule is tuned with. ``idle_s_min`` goes before beta: a replica is not stopped between two turns."""

    alpha: float = 15 / 16
    p: float = 0.8
    idle_s_min: float = 5.0
    idle_s_max: float = 3600.0
    first_gap_s: float = 300.0
    """Taken for the mean gap of a model that was asked at most once."""

    def beta_s(self, startup_s: float, share: float) -> float:
        """When idling has cost what it can save; ``share`` in (0, 1]."""
        assert share > 0, "a replica holds something"
        return self.alpha * startup_s / ((1 - self.alpha) * share)


DEFAULT_LIMITS = KeepAliveLimits()


class Arrivals:
    """When one model was asked last, a few times. A time before the last one counts as the last one."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=ARRIVALS_MAX)

    def note(self, now_s: float) -> None:
        """It was asked."""
        self._times.append(max(now_s, self._times[-1]) if self._times else now_s)

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

    def next_after_s(self, now_s: float, p: float) -> float | None:
        """Seconds from now within which the next arrival comes with probability ``p``, in [0, 1)."""
        mean_s = self.mean_gap_s(now_s)
        return None if mean_s is None else -mean_s * log(1 - p)


def keep_alive_s(
    arrivals: Arrivals, *, startup_s: float, share: float, now_s: float, limits: KeepAliveLimits = DEFAULT_LIMITS
) -> float:
    """How long a replica may idle; more for a longer startup, less for a larger ``share`` of its node."""
    likely_s = -_gap_s(arrivals, now_s, limits) * log(1 - limits.p)
    idle_s_max = min(limits.idle_s_max, limits.beta_s(startup_s, share))
    return max(limits.idle_s_min, min(likely_s, idle_s_max))


def keep_value_s(
    arrivals: Arrivals, *, startup_s: float, now_s: float, limits: KeepAliveLimits = DEFAULT_LIMITS
) -> float:
    """The startup that evicting it now is expected to cost: T, if it is asked again within beta of a whole node."""
    gap_s = _gap_s(arrivals, now_s, limits)
    horizon_s = limits.beta_s(startup_s, 1.0)
    return startup_s * (1 - exp(-horizon_s / gap_s)) if gap_s > 0 else startup_s


def wants_prefetch(arrivals: Arrivals, *, now_s: float, lead_s: float, p: float = DEFAULT_LIMITS.p) -> bool:
    """Whether the next arrival is likely within ``lead_s``, which is what making ready for it takes."""
    likely_s = arrivals.next_after_s(now_s, p)
    return likely_s is not None and likely_s <= lead_s


def _gap_s(arrivals: Arrivals, now_s: float, limits: KeepAliveLimits) -> float:
    """The mean gap, guessed where there is none."""
    mean_s = arrivals.mean_gap_s(now_s)
    return max(limits.first_gap_s, arrivals.silence_s(now_s)) if mean_s is None else mean_s
