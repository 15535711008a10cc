"""Summarises runs: one figure for each metric and run, and its spread over seeds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, nan
from statistics import fmean

from sllm_vllm.simulate.run import End, RequestOutcome, Run

Figures = Mapping[str, float]
"""Values by metric, whose name ends in its unit. NaN where there was nothing to measure."""

WAITS = {
    "TTFT mean": "ttft_mean_s",
    "P50": "ttft_p50_s",
    "P95": "ttft_p95_s",
    "P99": "ttft_p99_s",
    "startup": "startup_mean_s",
    "if cold": "startup_cold_mean_s",
}
SLOWEST = {
    "startup P99": "startup_p99_s",
    "slots": "slowest_slots_s",
    "start": "slowest_start_s",
    "room": "slowest_room_s",
}
COSTS = {
    "total": "total_mean_s",
    "cold": "cold_share",
    "accel. s": "accelerator_s",
    "starts": "num_starts",
    "moves": "num_moves",
    "recomputed": "num_recomputed_tokens",
    "rejected": "num_rejected",
    "broken": "num_broken",
    "lost": "num_lost",
}
"""Headings of the tables above, and the metric below each."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric over seeds."""

    mean: float
    least: float
    most: float

    @property
    def range(self) -> str:
        """The least and the most, formatted."""
        return f"{shown(self.least)}–{shown(self.most)}"


def shown(value: float) -> str:
    """Format a value to about three significant figures."""
    if value != value or value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def figures(run: Run) -> Figures:
    """One run's metrics. A request without a token has no TTFT, so read TTFT beside the rejected, broken and lost
    ones."""
    outcomes = list(run.outcomes.values())
    ttft_s = sorted(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None)
    startup_s = sorted(outcome.startup_s for outcome in outcomes if outcome.startup_s is not None)
    cold_s = sorted(outcome.startup_s for outcome in outcomes if outcome.startup_s is not None and outcome.is_cold)
    answered = [outcome for outcome in outcomes if outcome.end is End.ANSWERED]
    return {
        "ttft_mean_s": mean(ttft_s),
        "ttft_p50_s": percentile(ttft_s, 0.50),
        "ttft_p95_s": percentile(ttft_s, 0.95),
        "ttft_p99_s": percentile(ttft_s, 0.99),
        "startup_cold_mean_s": mean(cold_s),
        "startup_cold_p99_s": percentile(cold_s, 0.99),
        "startup_mean_s": mean(startup_s),
        "startup_p99_s": percentile(startup_s, 0.99),
        **_slowest(outcomes),
        "total_mean_s": mean([outcome.total_s for outcome in answered if outcome.total_s is not None]),
        "cold_share": len(cold_s) / len(startup_s) if startup_s else nan,
        "accelerator_s": run.accelerator_s,
        "num_requests": len(outcomes),
        "num_rejected": _count(outcomes, End.REJECTED),
        "num_broken": _count(outcomes, End.BROKEN),
        "num_left": _count(outcomes, End.LEFT),
        "num_lost": _count(outcomes, None),
        "num_starts": run.num_starts,
        "num_start_failures": run.num_start_failures,
        "num_crashes": run.num_crashes,
        "num_node_losses": run.num_losses,
        "num_moves": run.num_moves,
        "num_recomputed_tokens": run.num_recomputed_tokens,
        "num_preemptions": run.num_preemptions,
        "num_prefetches": run.num_prefetches,
        "duration_s": run.end_s,
    }


def _slowest(outcomes: Sequence[RequestOutcome]) -> dict[str, float]:
    """The parts of the startup wait, averaged over the 1 % of requests that waited longest for a ready replica."""
    sent = sorted((one for one in outcomes if one.startup_s is not None), key=lambda one: -(one.startup_s or 0.0))
    waits = [one.waits_s for one in sent[: ceil(len(sent) / 100)]]
    names = ("slowest_slots_s", "slowest_start_s", "slowest_room_s")
    return {name: mean([wait[place] for wait in waits]) for place, name in enumerate(names)}


def _count(outcomes: Sequence[RequestOutcome], end: End | None) -> int:
    return sum(outcome.end is end for outcome in outcomes)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN if there are no values."""
    return fmean(values) if values else nan


def percentile(ordered: Sequence[float], share: float) -> float:
    """The percentile by nearest rank: the least value that at least ``share`` of the sorted values do not exceed. NaN
    if there are none."""
    return ordered[max(1, ceil(share * len(ordered))) - 1] if ordered else nan


def spread(runs: Sequence[Figures]) -> dict[str, Spread]:
    """The spread of each metric over runs with different seeds."""
    names = list(runs[0]) if runs else []
    return {name: _spread([run[name] for run in runs]) for name in names}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), min(values), max(values))


def ratios(runs: Mapping[str, Sequence[Figures]], name: str, of: str) -> list[dict[str, object]]:
    """A table row for each policy but ``of``: its metric over that of ``of`` with the same seed."""
    rows: list[dict[str, object]] = []
    for policy, of_seeds in runs.items():
        if policy != of:
            found = sorted(one[name] / other[name] for one, other in zip(of_seeds, runs[of], strict=True))
            at = {"least": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "most": 1.0}
            rows.append({"policy": policy, **{word: f"{percentile(found, share):.2f}" for word, share in at.items()}})
    return rows


def table(runs: Mapping[str, Sequence[Figures]], headings: Mapping[str, str]) -> list[dict[str, object]]:
    """A table row for each policy: means over seeds."""
    spreads = {policy: spread(of_seeds) for policy, of_seeds in runs.items()}
    return [
        {"policy": policy, **{heading: shown(found[name].mean) for heading, name in headings.items()}}
        for policy, found in spreads.items()
    ]


def ranges(runs: Mapping[str, Sequence[Figures]], headings: Mapping[str, str]) -> list[dict[str, object]]:
    """A table row for each policy: least and most over seeds."""
    spreads = {policy: spread(of_seeds) for policy, of_seeds in runs.items()}
    return [
        {"policy": policy, **{heading: found[name].range for heading, name in headings.items()}}
        for policy, found in spreads.items()
    ]


def record(runs: Mapping[str, Sequence[Figures]]) -> dict[str, object]:
    """All figures as a JSON record. NaN becomes null."""
    return {
        policy: {
            "seeds": [{name: _or_none(value) for name, value in run.items()} for run in of_seeds],
            "spread": {
                name: {"mean": _or_none(s.mean), "min": _or_none(s.least), "max": _or_none(s.most)}
                for name, s in spread(of_seeds).items()
            },
        }
        for policy, of_seeds in runs.items()
    }


def _or_none(value: float) -> float | None:
    return None if value != value else round(value, 6)
