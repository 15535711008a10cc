"""How the command ``sllm-vllm`` shows things: tables on stdout, progress on stderr. Rich is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

_NAME_SHOWN = 36


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


def print_section(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table below an empty line; one line that says so if it has no rows."""
    typer.echo("")
    if rows:
        print_table(title, rows)
    else:
        typer.echo(f"no {title}")


def or_dash(value: object) -> object:
    """A value, or a dash for None."""
    return "-" if value is None else value


def short(name: str) -> str:
    """A name that leaves room for figures; its end, which tells checkpoints of one model apart, stays."""
    return name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 22]}…{name[-21:]}"


def age(seconds: float) -> str:
    """A time for a person: ``3.5 s``, ``12 min``, ``5.0 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def wrong_usage(line: str) -> NoReturn:
    """End the command: it can't be meant like this."""
    typer.echo(f"sllm-vllm: {' '.join(line.split())}", err=True)
    raise typer.Exit(2)
