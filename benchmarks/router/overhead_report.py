"""Results of measuring the router's overhead: turns samples of rounds into rows, tables, notes and verdicts. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.loading.report import Verdict
from sllm_vllm.units import KIB, MIB

DIRECT, OURS = "direct", "ours"
OURS_SOCKET = "ours, socket"
"""Our router with its own engine on a Unix socket."""
BEHIND_US = ("litellm", "Ray Serve")
"""Peers that must not lead our router in any column."""
ADDED_MS_MAX = 1.5
OTHERS_MAX = 0.05
"""Share of the machine that other work may take before figures are called noisy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One target under one load in one round. ``kind``: ``first`` times first bytes, ``stream`` the passing on of
    chunks.
    """

    kind: str
    target: str
    streams: int
    round: int
    p50_ms: float
    p99_ms: float
    num_firsts: int
    chunks: int
    seconds: float
    cpu_s: float | None
    others: float
    faults: tuple[str, ...] = ()

    @property
    def chunks_core_s(self) -> float | None:
        """Chunks passed per second of processor time; None for the direct target, or if no time was used."""
        return self.chunks / self.cpu_s if self.cpu_s else None

    def as_json(self, backend: str) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "kind": "overhead_sample",
            "backend": backend,
            "load": self.kind,
            "target": self.target,
            "streams": self.streams,
            "round": self.round,
            "p50_ms": round(self.p50_ms, 4),
            "p99_ms": round(self.p99_ms, 4),
            "num_firsts": self.num_firsts,
            "chunks": self.chunks,
            "seconds": round(self.seconds, 3),
            "cpu_s": self.cpu_s if self.cpu_s is None else round(self.cpu_s, 3),
            "others": round(self.others, 4),
            "faults": list(self.faults),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenMemory:
    """Memory of a target's processes, in bytes: without streams, and with ``streams`` open."""

    target: str
    streams: int
    processes: int
    idle_nbytes: int
    open_nbytes: int
    faults: tuple[str, ...] = ()

    @property
    def per_stream_nbytes(self) -> float:
        """Memory per open stream."""
        return (self.open_nbytes - self.idle_nbytes) / self.streams

    def as_json(self, backend: str) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "kind": "overhead_memory",
            "backend": backend,
            "target": self.target,
            "streams": self.streams,
            "processes": self.processes,
            "idle_nbytes": self.idle_nbytes,
            "open_nbytes": self.open_nbytes,
            "per_stream_nbytes": round(self.per_stream_nbytes),
            "faults": list(self.faults),
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest value over the rounds."""

    median: float
    low: float
    high: float

    def shown(self, digits: int) -> str:
        """The spread as text."""
        if self.low == self.high:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"

    def as_json(self) -> dict[str, float]:
        """For a line of JSON."""
        return {"median": round(self.median, 4), "min": round(self.low, 4), "max": round(self.high, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target. ``firsts``: by streams and percentile, milliseconds added to direct; for direct, its own."""

    target: str
    firsts: dict[tuple[int, str], Spread]
    chunks_core_s: dict[int, Spread]
    memory: OpenMemory | None

    def as_json(self, backend: str) -> dict[str, Any]:
        """For a line of JSON."""
        name = "first_ms" if self.target == DIRECT else "added_ms"
        return {
            "kind": "overhead",
            "backend": backend,
            "target": self.target,
            name: {f"{streams} {which}": spread.as_json() for (streams, which), spread in self.firsts.items()},
            "chunks_core_s": {str(streams): spread.as_json() for streams, spread in self.chunks_core_s.items()},
            "per_stream_nbytes": None if self.memory is None else round(self.memory.per_stream_nbytes),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def rows_of(samples: Sequence[Sample], memories: Sequence[OpenMemory]) -> list[Row]:
    """A row for each target, in the order of the samples. Each round is compared with direct in the same round."""
    of = {(one.kind, one.target, one.streams, one.round): one for one in samples}
    rows = []
    for target in dict.fromkeys(one.target for one in samples):
        firsts: dict[tuple[int, str], list[float]] = {}
        for one in samples:
            base = of.get(("first", DIRECT, one.streams, one.round))
            if one.kind != "first" or one.target != target or base is None:
                continue
            for which, value, direct in (("P50", one.p50_ms, base.p50_ms), ("P99", one.p99_ms, base.p99_ms)):
                firsts.setdefault((one.streams, which), []).append(value if target == DIRECT else value - direct)
        rates: dict[int, list[float]] = {}
        for one in samples:
            if (one.kind, one.target) == ("stream", target) and one.chunks_core_s is not None:
                rates.setdefault(one.streams, []).append(one.chunks_core_s)
        rows.append(
            Row(
                target=target,
                firsts={key: _spread(values) for key, values in firsts.items()},
                chunks_core_s={key: _spread(values) for key, values in rates.items()},
                memory=next((memory for memory in memories if memory.target == target), None),
            )
        )
    return rows


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def tables_of(rows: Sequence[Row], missing: dict[str, str], backend: str) -> list[Table]:
    """Tables to print: first bytes; the cost of passing chunks on. ``missing``: peers not measured, and why."""
    keys = list(dict.fromkeys(key for row in rows for key in row.firsts))
    title = f"{backend}: first byte, ms added to direct: median (least to most) of the rounds"
    firsts = _table(title, [f"{streams} {which}" for streams, which in keys])
    for row in rows:
        cells = [row.firsts[key].shown(2) if key in row.firsts else "-" for key in keys]
        firsts.add_row("direct (as it is)" if row.target == DIRECT else row.target, *cells)
    counts = list(dict.fromkeys(count for row in rows for count in row.chunks_core_s))
    columns = [f"{count}: chunks/s a core" for count in counts]
    costs = _table(f"{backend}: passing on", [*columns, "KiB a stream", "MiB idle", "processes"])
    for row in rows:
        if row.target != DIRECT and counts:
            cells = [row.chunks_core_s[count].shown(0) if count in row.chunks_core_s else "-" for count in counts]
            costs.add_row(row.target, *cells, *_memory_cells(row.memory))
    for name, why in missing.items():
        for table in (firsts, costs):
            table.add_row(name, f"not measured: {why.splitlines()[0]}")
    return [firsts, costs] if counts else [firsts]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("target", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory_cells(memory: OpenMemory | None) -> list[str]:
    if memory is None:
        return ["-", "-", "-"]
    return [f"{memory.per_stream_nbytes / KIB:.1f}", f"{memory.idle_nbytes / MIB:.0f}", str(memory.processes)]


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a row, to compare. ``sign``: 1 if less is better, else -1."""

    name: str
    value: float
    sign: int


def columns_of(row: Row) -> list[Column]:
    """All figures of a row that are compared."""
    found = [Column(f"{streams} {which}", spread.median, 1) for (streams, which), spread in row.firsts.items()]
    found += [Column(f"{count}: chunks/s a core", spread.median, -1) for count, spread in row.chunks_core_s.items()]
    return found if row.memory is None else [*found, Column("KiB a stream", row.memory.per_stream_nbytes / KIB, 1)]


def leads_of(row: Row, ours: Row) -> list[str]:
    """The columns in which a peer is ahead of our router, with both figures."""
    mine = {column.name: column for column in columns_of(ours)}
    return [
        f"{theirs.name} ({theirs.value:,.2f}, ours {mine[theirs.name].value:,.2f})"
        for theirs in columns_of(row)
        if theirs.name in mine and theirs.sign * theirs.value < theirs.sign * mine[theirs.name].value
    ]


def verdicts_of(rows: Sequence[Row], backend: str) -> list[Verdict]:
    """Acceptance verdicts: what our router adds, and that no peer of ``BEHIND_US`` is ahead in any column."""
    by_name = {row.target: row for row in rows}
    if (ours := by_name.get(OURS)) is None:
        return []
    medians = {streams: spread.median for (streams, which), spread in ours.firsts.items() if which == "P50"}
    figures = ", ".join(f"{value:.2f} ms at {streams}" for streams, value in medians.items())
    is_met = all(value <= ADDED_MS_MAX for value in medians.values())
    found = [Verdict(f"{backend}: ours adds at most {ADDED_MS_MAX} ms (P50)", is_met, figures)]
    for name in BEHIND_US:
        if name in by_name:
            leads = leads_of(by_name[name], ours)
            told = f"it leads in {', '.join(leads)}" if leads else "it leads nowhere"
            found.append(Verdict(f"{backend}: ours ahead of {name} in every column", not leads, told))
    return found


def notes_of(rows: Sequence[Row], samples: Sequence[Sample], backend: str) -> list[str]:
    """Notes: where other peers lead, and how quiet the machine was."""
    by_name = {row.target: row for row in rows}
    notes = []
    for name, row in by_name.items():
        if name not in {DIRECT, OURS, *BEHIND_US} and OURS in by_name:
            leads = leads_of(row, by_name[OURS])
            notes.append(f"{backend}: {name} leads ours in {', '.join(leads) if leads else 'no column'}")
    worst = max((sample.others for sample in samples), default=0.0)
    middle = statistics.median(sample.others for sample in samples) if samples else 0.0
    noisy = "; repeat it on a quiet machine" if middle > OTHERS_MAX else ""
    notes.append(f"{backend}: others took {middle:.1%} of the machine (median), {worst:.1%} at worst{noisy}")
    return notes
