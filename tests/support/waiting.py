"""Waiting for a state, with an end: the only place of the tests that sleeps, and never for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE_S = 300.0
"""For whatever a test waits for: long enough on a busy machine, so it only ends what hangs."""
_INTERVAL_S = 0.01


def wait_until(is_so: Callable[[], object], what: str) -> None:
    """Return when ``is_so`` gives something true.

    Raises:
        TimeoutError: it did not within ``DEADLINE_S``; ``what`` says what was waited for.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {DEADLINE_S:.0f} s in vain for {what}")
        time.sleep(_INTERVAL_S)
