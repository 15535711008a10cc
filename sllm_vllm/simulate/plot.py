"""Draws curves of requests' waits as a PNG. Needs matplotlib, which is imported only here, and only when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sllm_vllm.errors import ConfigError


def write_cdfs(path: Path, title: str, waits: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw a panel for each kind of wait in ``waits``, with a curve for each policy; values are seconds.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a PNG needs matplotlib, which is not installed; pip install matplotlib") from error
    figure = Figure(figsize=(5.5 * len(waits), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (kind, of_policies) in enumerate(waits.items(), 1):
        axes = figure.add_subplot(1, len(waits), number)
        for policy, values in of_policies.items():
            ordered = sorted(values)
            shares = [rank / len(ordered) for rank in range(1, len(ordered) + 1)]
            axes.step(ordered, shares, where="post", label=policy)
        axes.set(xlabel=f"{kind}, s", ylabel="share of requests", ylim=(0, 1))
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(loc="upper left")
    figure.savefig(path, dpi=150)
