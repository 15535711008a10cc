"""Draws the cold-start results: one bar for each case and way, stacked by phase. Needs only the lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cold_start.report import FIRST_TOKEN, PHASE_NAMES, REST

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn
    from matplotlib.axes import Axes

WIDTH_IN = 9.0
BAR_IN = 0.27
FRAME_IN = 1.9
"""Height of title, axis and legend together."""
DPI = 200
NAMES_AT = -0.075
"""Position of the cases' names, left of the ways' names, as a fraction of the axes' width."""
SHARE_MIN = 0.01
"""A phase below this share of every bar is drawn as part of "not accounted for"."""
COLORS = {
    "process": "#8c8c8c",
    "parent": "#dddddd",
    "imports": "#4477aa",
    "inspect": "#332288",
    "workers": "#66ccee",
    "init": "#228833",
    "weights": "#ee6677",
    "profile": "#ccbb44",
    "compile": "#997700",
    "warmup": "#ee8866",
    "graphs": "#77aadd",
    "http": "#aa3377",
    REST: "#cccccc",
    FIRST_TOKEN: "#222222",
}

Bar = tuple[str, Mapping[str, float], float]
"""Name, seconds by phase, and the median time to the first token."""


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines of JSON of an earlier run."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def groups_of(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Bar]]]:
    """A group of bars for each row, in the order of the rows."""
    groups: list[tuple[str, list[Bar]]] = []
    for line in lines:
        if line["kind"] == "row":
            bars: list[Bar] = [
                (way, cell["phases"], cell["first_token_s"]["median"]) for way, cell in line["ways"].items()
            ]
            groups.append((f"{line['architecture']} {line['size']}\n{line['tier']}", bars))
    return groups


def merged(bars: Sequence[Bar]) -> list[Bar]:
    """The bars without phases that are small in every bar; those seconds are added to "not accounted for"."""
    kept = {
        name
        for _, phases, _ in bars
        for name, seconds in phases.items()
        if name in {REST, FIRST_TOKEN} or seconds >= SHARE_MIN * sum(phases.values())
    }
    found: list[Bar] = []
    for name, phases, median_s in bars:
        shown = {phase: seconds for phase, seconds in phases.items() if phase in kept}
        shown[REST] = shown.get(REST, 0.0) + sum(phases.values()) - sum(shown.values())
        found.append((name, shown, median_s))
    return found


def title_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, and on which machine."""
    machine = next((line for line in lines if line["kind"] == "machine"), None)
    what = "From the order to the first token, medians"
    if machine is None:
        return what
    return f"{what}\nvLLM {machine['versions']['vllm']} on {machine['cpus']} CPUs ({machine['cpu']})"


def draw(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the picture as PNG, on a white background whatever surrounds it. ``lines`` must contain a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = groups_of(lines)
    bars = merged([bar for _, found in groups for bar in found])
    places = _places([len(found) for _, found in groups])
    figure = Figure(figsize=(WIDTH_IN, FRAME_IN + BAR_IN * (places[-1] + 1)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_bars(axes, bars, places)
    first = 0
    for name, found in groups:
        middle = (places[first] + places[first + len(found) - 1]) / 2
        axes.text(NAMES_AT, middle, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8)
        first += len(found)
    _dress(axes)
    axes.set_title(title_of(lines), fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, facecolor="white")


def _draw_bars(axes: Axes, bars: Sequence[Bar], places: Sequence[float]) -> None:
    left = [0.0] * len(bars)
    for phase in (name for name in PHASE_NAMES if any(name in phases for _, phases, _ in bars)):
        widths = [phases.get(phase, 0.0) for _, phases, _ in bars]
        axes.barh(places, widths, left=left, height=0.8, color=COLORS[phase], label=PHASE_NAMES[phase])
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, end, (_, _, median_s) in zip(places, left, bars, strict=True):
        axes.text(end, place, f" {median_s:.1f} s", va="center", fontsize=8, color="#222222")
    axes.set_yticks(places, [name for name, _, _ in bars], fontsize=8)


def _dress(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _places(sizes: Sequence[int]) -> list[float]:
    """Positions of the bars, from the top, with a gap between groups."""
    places, at = [], 0.0
    for size in sizes:
        places += [at + position for position in range(size)]
        at += size + 0.6
    return places
