"""Shows what a long-running program is doing and for how long: a line for each step; on a terminal, a running clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn


class Progress:
    """Prints a line when a step begins, prefixed with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start_s = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(
            f"[{time.monotonic() - self._start_s:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True
        )

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Print what begins now; a terminal shows a clock until the step ends."""
        self.say(text)
        if not self._console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with RichProgress(*columns, console=self._console, transient=True) as clock:
            clock.add_task(text, total=None)
            yield
