"""Turns single starts into results: rows, phases, verdicts, lines of JSON. Pure, except for building tables."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table

from benchmarks.loading.report import Verdict
from sllm_vllm.node.core.phases import StartPhase

Way = Literal["stock", "cold", "warm"]
Tier = Literal["disk warm", "disk cold", "store"]
WAYS: tuple[Way, ...] = ("stock", "cold", "warm")
TIERS: tuple[Tier, ...] = ("disk warm", "disk cold", "store")
SMALL = "tiny"
"""The size that the acceptance criteria apply to."""
WARM_FIRST_TOKEN_S_MAX = 1.5
STOCK_OVER_WARM_MIN = 12.0
TENTHS_FROM_S = 10.0
"""From this value on, a table shows tenths of a second instead of hundredths."""
REST, FIRST_TOKEN = "rest", "first_token"
"""Added to the phases of a start: time that no line of its log accounts for; time from healthy to the first token."""
PHASE_NAMES = {phase.name.lower(): phase.value for phase in StartPhase if phase is not StartPhase.READY}
PHASE_NAMES |= {REST: "not accounted for", FIRST_TOKEN: "first token"}
"""Phases in words, in their order."""

Tokens = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Token ids of every question and of its answer."""


class Case(NamedTuple):
    """A combination to start: architecture, size and tier."""

    architecture: str
    size: str
    tier: Tier

    @property
    def words(self) -> str:
        """The case in words."""
        return f"{self.architecture} {self.size}, {self.tier}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start. Times are seconds since its order; the phases add up to ``first_token_s``."""

    case: Case
    way: Way
    round: int
    healthy_s: float
    first_token_s: float
    phases: Mapping[str, float]
    disturbance: float
    """Share of processor time used neither by the engine nor by this benchmark, from the order to the first token."""
    tokens: Tokens
    load: Mapping[str, str]
    """What our loader reported; empty for vLLM's loader."""

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON; tokens are given as a digest."""
        return {
            "kind": "start",
            **self.case._asdict(),
            "way": self.way,
            "round": self.round,
            "healthy_s": round(self.healthy_s, 4),
            "first_token_s": round(self.first_token_s, 4),
            "disturbance": round(self.disturbance, 4),
            "tokens": hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()[:16],
            "phases": _rounded(self.phases),
            # Of a path only the last part: the rest is specific to this machine.
            "load": {name: said.rpartition("/")[2] for name, said in self.load.items()},
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """Minimum, median and maximum seconds over all rounds."""

    min_s: float
    median_s: float
    max_s: float

    def __str__(self) -> str:
        digits = 2 if self.median_s < TENTHS_FROM_S else 1
        return f"{self.median_s:.{digits}f} [{self.min_s:.{digits}f}–{self.max_s:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Cell:
    """One way in one case, over all rounds. ``phases`` holds the median of each phase on its own."""

    rounds: int
    healthy: Spread
    first_token: Spread
    phases: Mapping[str, float]
    disturbance: float
    """Disturbance in the worst round."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case, with a cell for each way."""

    case: Case
    cells: Mapping[Way, Cell]

    @property
    def ratio(self) -> float | None:
        """Time to the first token: stock's median over that of warm; None if one of them was not measured."""
        if "stock" not in self.cells or "warm" not in self.cells:
            return None
        return self.cells["stock"].first_token.median_s / self.cells["warm"].first_token.median_s

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        ways = {
            way: {
                "rounds": cell.rounds,
                "healthy_s": _spread_json(cell.healthy),
                "first_token_s": _spread_json(cell.first_token),
                "disturbance": round(cell.disturbance, 4),
                "phases": _rounded(cell.phases),
            }
            for way, cell in self.cells.items()
        }
        ratio = None if self.ratio is None else round(self.ratio, 2)
        return {"kind": "row", **self.case._asdict(), "stock_over_warm": ratio, "ways": ways}


def phases_of(told: Mapping[str, float], healthy_s: float, first_token_s: float) -> dict[str, float]:
    """Split the time to the first token into the reported phases, unaccounted time, and the wait for the first token.

    Args:
        told: seconds by phase, as in a ``StartReport``.
    """
    phases = {name: seconds for name, seconds in told.items() if name in PHASE_NAMES}
    phases[REST] = max(0.0, healthy_s - sum(phases.values()))
    phases[FIRST_TOKEN] = max(0.0, first_token_s - sum(phases.values()))
    return phases


def ways_in_turn(ways: Sequence[Way], number: int) -> list[Way]:
    """The order of the ways in a round (counted from 1): rotated, so that each comes first in turn."""
    begin = (number - 1) % len(ways)
    return [*ways[begin:], *ways[:begin]]


def rows_of(starts: Iterable[Start]) -> list[Row]:
    """A row for each case, in the order of their first starts."""
    found: dict[Case, dict[Way, list[Start]]] = {}
    for start in starts:
        found.setdefault(start.case, {}).setdefault(start.way, []).append(start)
    return [Row(case, {way: _cell_of(by_way[way]) for way in WAYS if way in by_way}) for case, by_way in found.items()]


def verdicts_of(starts: Sequence[Start]) -> list[Verdict]:
    """Verdicts on the acceptance criteria that were measured; the verdict on tokens comes last."""
    verdicts = []
    for row in rows_of(starts):
        if row.case.size == SMALL and (warm := row.cells.get("warm")) is not None:
            verdicts.append(_first_token_verdict(row.case, warm.first_token.median_s))
        if row.case.size == SMALL and row.ratio is not None:
            verdicts.append(_ratio_verdict(row.case, row.ratio))
    return [*verdicts, tokens_verdict(starts)]


def tokens_verdict(starts: Sequence[Start]) -> Verdict:
    """The verdict on whether all starts of a model gave the same answers, in all tiers."""
    first: dict[tuple[str, str], Start] = {}
    differing = []
    for start in starts:
        reference = first.setdefault((start.case.architecture, start.case.size), start)
        if start.tokens != reference.tokens:
            differing.append(f"{_name(start)} from {_name(reference)}")
    answers = sum(len(start.tokens) for start in starts)
    figures = f"{answers} answers of {len(starts)} starts" + "".join(f"; differs: {name}" for name in differing)
    return Verdict("token ids of all ways are equal", bool(starts) and not differing, figures)


def table_of(rows: Sequence[Row]) -> Table:
    """Seconds to healthy and to the first token, as a table to print."""
    table = Table(
        title="seconds from the order: median [min–max]", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("case", no_wrap=True)
    for column in ("healthy", "first token"):
        for way in WAYS:
            table.add_column(f"{way}\n{column}", justify="right", no_wrap=True)
    for column in ("stock/\nwarm", "noise"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.cells.get(way) for way in WAYS]
        table.add_row(
            row.case.words,
            *("-" if cell is None else str(cell.healthy) for cell in cells),
            *("-" if cell is None else str(cell.first_token) for cell in cells),
            "-" if row.ratio is None else f"{row.ratio:.1f}",
            f"{max(cell.disturbance for cell in row.cells.values()):.0%}",
        )
    return table


def phases_table_of(rows: Sequence[Row]) -> Table:
    """Seconds by phase, as a table to print."""
    names = [name for name in PHASE_NAMES if any(name in cell.phases for row in rows for cell in row.cells.values())]
    table = Table(title="seconds by phase, medians", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("case", "way"):
        table.add_column(column, no_wrap=True)
    for name in names:
        table.add_column(PHASE_NAMES[name].replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        for way, cell in row.cells.items():
            shown = (f"{cell.phases[name]:.2f}" if name in cell.phases else "-" for name in names)
            table.add_row(row.case.words, way, *shown)
    return table


def _cell_of(starts: Sequence[Start]) -> Cell:
    names = [name for name in PHASE_NAMES if any(name in start.phases for start in starts)]
    return Cell(
        rounds=len(starts),
        healthy=_spread_of([start.healthy_s for start in starts]),
        first_token=_spread_of([start.first_token_s for start in starts]),
        phases={name: statistics.median(start.phases.get(name, 0.0) for start in starts) for name in names},
        disturbance=max(start.disturbance for start in starts),
    )


def _spread_of(seconds: Sequence[float]) -> Spread:
    return Spread(min(seconds), statistics.median(seconds), max(seconds))


def _spread_json(spread: Spread) -> dict[str, float]:
    return {"min": round(spread.min_s, 4), "median": round(spread.median_s, 4), "max": round(spread.max_s, 4)}


def _first_token_verdict(case: Case, seconds: float) -> Verdict:
    bound = WARM_FIRST_TOKEN_S_MAX
    name = f"{case.words}: warm, first token <= {bound:g} s"
    return Verdict(name, seconds <= bound, f"{seconds:.3f} s")


def _ratio_verdict(case: Case, ratio: float) -> Verdict:
    bound = STOCK_OVER_WARM_MIN
    return Verdict(f"{case.words}: first token, stock / warm >= {bound:g}", ratio >= bound, f"{ratio:.1f}")


def _name(start: Start) -> str:
    return f"{start.case.words}, {start.way}, round {start.round}"


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}
