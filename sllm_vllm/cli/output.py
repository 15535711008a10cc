"""How the command ``sllm-vllm`` shows things: tables on stdout, progress on stderr. Rich is imported when used."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

_GAP = "  "
_CUT_WIDTH_MIN = 8
"""Least width of a column that is cut."""


def progress_bar() -> Progress:
    """Bars on stderr, with bytes and rate; removed at the end, and not shown off a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    sizes = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *sizes)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def command_group(name: str, about: str, *, completes: bool = False) -> typer.Typer:
    """A group of commands. Help and errors are plain text: brackets in them are no markup.

    Args:
        about: what `--help` says of it.
        completes: it takes `--install-completion` and `--show-completion`.
    """
    return typer.Typer(
        name=name,
        help=about,
        no_args_is_help=True,
        add_completion=completes,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def print_json(record: object) -> None:
    """A record, indented. Paths are text, numbers are numbers."""
    typer.echo(json.dumps(record, indent=2, default=str))


def print_done(record: Mapping[str, object], line: str, *, as_json: bool) -> None:
    """What a command has done: as JSON for programs, as one line for people."""
    if as_json:
        print_json(record)
    else:
        typer.echo(line)


def print_table(title: str, rows: Sequence[Mapping[str, object]], *, cut: Collection[str] = ()) -> None:
    """Print records with equal keys, one a line.

    Args:
        cut: columns that are shortened until a line fits into the terminal. Away from a terminal nothing is.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if title:
        typer.secho(one_line(title), bold=True)
    for line in table_lines(rows, width=width, cut=cut):
        typer.echo(line)


def table_lines(rows: Sequence[Mapping[str, object]], *, width: int | None, cut: Collection[str] = ()) -> list[str]:
    """A table's header, if its columns have names, and its rows. ``width`` None: as wide as its content."""
    if not rows:
        return []
    texts = [[one_line(shown(key, value)) for key, value in row.items()] for row in rows]
    header = list(rows[0])
    lines = [header, *texts] if any(key.strip() for key in header) else texts
    widths = [max(map(cell_width, column)) for column in zip(*lines, strict=True)]
    if width is not None:
        _narrow(widths, [index for index, key in enumerate(header) if key in cut], width)
    is_right = [all(_is_figure(value) for value in column) for column in zip(*(r.values() for r in rows), strict=True)]
    return [_GAP.join(map(_fitted, line, widths, is_right)).rstrip() for line in lines]


def _narrow(widths: list[int], flexible: Sequence[int], width: int) -> None:
    """Take from the widest of the flexible columns until all fit, or none can give more."""
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda index: widths[index])
        if widths[widest] <= _CUT_WIDTH_MIN:
            return
        widths[widest] -= 1
        excess -= 1


def _is_figure(value: object) -> bool:
    return value is None or value == "-" or (isinstance(value, int | float) and not isinstance(value, bool))


def _fitted(text: str, width: int, is_right: bool) -> str:
    """A text of exactly this width: filled up, or cut where it says least."""
    if cell_width(text) > width:
        num_last = 0 if " " in text else (width - 1) * 3 // 5  # the end tells names apart
        last = _cropped(text[::-1], num_last)[::-1]
        text = f"{_cropped(text, width - 1 - cell_width(last))}…{last}"
    fill = " " * (width - cell_width(text))
    return fill + text if is_right else text + fill


def _cropped(text: str, width: int) -> str:
    """As much of its beginning as fits."""
    text = text[:width]
    while cell_width(text) > width:
        text = text[:-1]
    return text


def cell_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    from rich.cells import cell_len

    return len(text) if text.isascii() else cell_len(text)


def one_line(text: str) -> str:
    """A text that can't move the cursor or begin a line."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def shown(key: str, value: object) -> str:
    """A value as a person reads it: sizes in their unit, nothing as a dash."""
    from sllm_vllm.units import format_nbytes

    if value is None:
        return "-"
    return format_nbytes(value) if key.endswith("nbytes") and isinstance(value, int) else str(value)


def print_section(title: str, rows: Sequence[Mapping[str, object]], *, cut: Collection[str] = ()) -> None:
    """A table below an empty line; one line that says so if it has no rows."""
    typer.echo("")
    if rows:
        print_table(title, rows, cut=cut)
    else:
        typer.echo(f"no {title}")


def or_dash(value: object) -> object:
    """A value, or a dash for None."""
    return "-" if value is None else value


def age(seconds: float) -> str:
    """A time for a person: ``3.5 s``, ``12 min``, ``5.0 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def wrong_usage(*lines: str) -> NoReturn:
    """End the command: it can't be meant like this."""
    for line in lines:
        typer.echo(f"sllm-vllm: {one_line(line)}", err=True)
    raise typer.Exit(2)
