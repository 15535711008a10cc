"""Turns measurements into results: rows, shares of a limit, verdicts. Pure, except for building the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.loading.job import OURS, OURS_RESIDENT, Measurement
from benchmarks.loading.page_cache import Tier
from benchmarks.store.device_limits import Limits
from sllm_vllm.units import MIB, format_bps, format_nbytes

COLUMNS = (
    *("median s", "min..max", "build", "weights", "process", "rest"),
    *("rate", "of limit", "x stock", "peak", "noise"),
)
WARM_SHARE_SAVED = 0.9
"""With a warm page cache, the share of the stock loader's weights time that ours must save."""
COLD_OVER_LIMIT_MAX = 1.1
PEAK_OVER_MODEL_MAX = 256 * MIB
RESIDENT_OVER_PROCESS_MAX = 1.1

Samples = Mapping[tuple[str, Tier], Sequence[Measurement]]
"""(loader, tier) → one measurement per round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One loader in one tier, over all rounds. Each part's seconds are its own median."""

    loader: str
    tier: Tier
    nbytes: int
    rounds: int
    min_s: float
    median_s: float
    max_s: float
    construct_s: float
    weights_s: float
    weights_wall_s: float
    process_s: float
    rest_s: float
    limit_s: float
    peak_nbytes: int | None
    residency: float
    disturbance: float
    """Share of the processors that others used, in the worst round."""
    reference_s: float
    """The stock loader's median in the same tier of the same run."""

    @property
    def bps(self) -> float:
        """Bytes per second: the model's size over the time of the whole ``load_model``."""
        return self.nbytes / self.median_s

    @property
    def limit_share(self) -> float:
        """The machine's limit over the measured time; 1 would be as fast as the machine allows."""
        return self.limit_s / self.median_s

    @property
    def ratio(self) -> float:
        """Measured time over the stock loader's."""
        return self.median_s / self.reference_s

    def as_json(self) -> dict[str, Any]:
        """All figures, for a line of JSON."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        numbers = {"bps": self.bps, "limit_share": self.limit_share, "ratio": self.ratio}
        return {"kind": "row", **_rounded({**fields, **numbers})}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one acceptance criterion."""

    name: str
    is_met: bool
    figures: str

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {"kind": "verdict", "name": self.name, "met": self.is_met, "figures": self.figures}


def rows_of(samples: Samples, limits: Sequence[Limits], *, reference: str) -> list[Row]:
    """A row for each loader and tier, in the order of the samples."""
    limit_s = {tier: limit_of(samples, limits, tier=tier, reference=reference) for tier in ("warm", "cold")}
    nbytes = limits[0].nbytes
    rows = []
    for (loader, tier), found in samples.items():
        rows.append(
            Row(
                loader=loader,
                tier=tier,
                nbytes=nbytes,
                rounds=len(found),
                min_s=min(m.seconds for m in found),
                median_s=_median(found, lambda m: m.seconds),
                max_s=max(m.seconds for m in found),
                construct_s=_median(found, lambda m: m.construct_s),
                weights_s=_median(found, lambda m: m.weights_s),
                weights_wall_s=_median(found, lambda m: m.weights_wall_s),
                process_s=_median(found, lambda m: m.process_s),
                rest_s=_median(found, lambda m: m.rest_s),
                limit_s=limit_s[tier],
                peak_nbytes=max((m.peak_nbytes for m in found if m.peak_nbytes is not None), default=None),
                residency=_median(found, lambda m: m.residency),
                disturbance=max(m.disturbance for m in found),
                reference_s=_median(samples[reference, tier], lambda m: m.seconds),
            )
        )
    return rows


def limit_of(samples: Samples, limits: Sequence[Limits], *, tier: Tier, reference: str) -> float:
    """The least time the machine needs: to read or copy the bytes, or to post-process them, whichever takes longer."""
    bring_s = statistics.median(limit.best_read_s if tier == "cold" else limit.copy_s for limit in limits)
    return max(bring_s, process_alone_s(samples, tier=tier, reference=reference))


def process_alone_s(samples: Samples, *, tier: Tier, reference: str) -> float:
    """Seconds of post-processing alone, from the stock loader, which begins it when all weights are loaded."""
    return _median(samples[reference, tier], lambda m: m.process_s)


def verdicts_of(rows: Sequence[Row], *, read_s: float, process_s: float, reference: str) -> list[Verdict]:
    """The verdicts on our loader's acceptance criteria, inside vLLM."""
    by_key = {(row.loader, row.tier): row for row in rows}
    warm, cold = by_key[OURS, "warm"], by_key[OURS, "cold"]
    stock = by_key[reference, "warm"]
    bound_warm = stock.median_s - WARM_SHARE_SAVED * stock.weights_s
    bound_cold = COLD_OVER_LIMIT_MAX * max(read_s, process_s)
    verdicts = [
        Verdict(
            "(a) warm: ours <= stock - 0.9 x stock's weights",
            warm.median_s <= bound_warm,
            f"{warm.median_s:.3f} s <= {stock.median_s:.3f} - 0.9 x {stock.weights_s:.3f} = {bound_warm:.3f} s",
        ),
        Verdict(
            "(b) cold: ours <= 1.1 x max(O_DIRECT read, post-processing alone)",
            cold.median_s <= bound_cold,
            f"{cold.median_s:.3f} s <= 1.1 x max({read_s:.3f}, {process_s:.3f}) = {bound_cold:.3f} s",
        ),
        _peak_verdict(warm, cold),
    ]
    if (resident := by_key.get((OURS_RESIDENT, "warm"))) is not None:
        verdicts.append(_resident_verdict(resident, process_s))
    return verdicts


def _resident_verdict(row: Row, process_s: float) -> Verdict:
    bound = RESIDENT_OVER_PROCESS_MAX * process_s
    parts = f"build {row.construct_s:.3f}, waiting {row.weights_s:.3f}, process {row.process_s:.3f}"
    return Verdict(
        "(f) resident in the store's pool: ours <= 1.1 x post-processing alone",
        row.median_s <= bound,
        f"{row.median_s:.3f} s ({parts}, rest {row.rest_s:.3f}) <= 1.1 x {process_s:.3f} = {bound:.3f} s",
    )


def _peak_verdict(*rows: Row) -> Verdict:
    peaks = [row.peak_nbytes for row in rows if row.peak_nbytes is not None]
    bound = rows[0].nbytes + PEAK_OVER_MODEL_MAX
    return Verdict(
        "(c) peak memory: ours <= model + 256 MiB",
        bool(peaks) and max(peaks) <= bound,
        f"{format_nbytes(max(peaks)) if peaks else 'unknown'} <= {format_nbytes(bound)}",
    )


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, as a table to print."""
    table = Table(title="load_model", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("loader", no_wrap=True)
    table.add_column("tier", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row.tier != "warm", row.median_s)):
        parts = (row.construct_s, row.weights_s, row.process_s, row.rest_s)
        table.add_row(
            row.loader,
            row.tier,
            f"{row.median_s:.2f}",
            f"{row.min_s:.2f}..{row.max_s:.2f}",
            *(f"{seconds:.2f}" for seconds in parts),
            format_bps(row.bps),
            f"{row.limit_share:.0%}",
            f"{row.ratio:.2f}",
            "-" if row.peak_nbytes is None else format_nbytes(row.peak_nbytes),
            f"{row.disturbance:.0%}",
        )
    return table


def limits_as_json(limits: Sequence[Limits], process_s: float) -> dict[str, Any]:
    """The machine's limits, medians over the rounds, for a line of JSON."""
    device = [limit.device_copy_bps for limit in limits if limit.device_copy_bps is not None]
    threads = limits[0].read_s
    fields = {
        "nbytes": limits[0].nbytes,
        "read_direct_s": {str(n): round(statistics.median(limit.read_s[n] for limit in limits), 4) for n in threads},
        "read_direct_best_s": statistics.median(limit.best_read_s for limit in limits),
        "copy_bps": statistics.median(limit.copy_bps for limit in limits),
        "device_copy_bps": statistics.median(device) if device else None,
        "process_alone_s": process_s,
    }
    return {"kind": "limits", **_rounded(fields)}


def _median(found: Sequence[Measurement], value: Callable[[Measurement], float]) -> float:
    return statistics.median(value(measurement) for measurement in found)


def _rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
