"""How the command ``sllm-vllm`` shows things: tables on stdout, progress on stderr. Rich is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bar() -> Progress:
    """Bars on stderr, with bytes and rate; nothing of them stays, and nothing is shown where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    sizes = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *sizes)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print records with equal keys, one a line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = any(key.strip() for row in rows for key in row)
    for key, value in rows[0].items() if rows else ():
        table.add_column(key, overflow="fold", justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*(Text(shown(key, value)) for key, value in row.items()))
    Console().print(table)


def shown(key: str, value: object) -> str:
    """A value as a person reads it: sizes in their unit, nothing as a dash."""
    from sllm_vllm.units import format_nbytes

    if value is None:
        return "-"
    return format_nbytes(value) if key.endswith("nbytes") and isinstance(value, int) else str(value)
