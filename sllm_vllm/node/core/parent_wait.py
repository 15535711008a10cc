"""Whether a start waits for the warm parent that is importing, or starts cold beside it. Pure; used by ``ParentWait``.

An engine that is forked from the parent is ready a second or two after the parent; a cold one imports vLLM in three
processes, one after the other, and meanwhile competes with the parent for processors. Both times are estimated from
this node's own imports and cold starts, which the agent keeps across restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median_low

SAMPLES_MAX = 8
RECORD_VERSION = 1
IMPORT_S = 30.0
"""Assumed duration of an import until one was measured on this node."""
COLD_IMPORTS = 3
"""Assumed duration of a cold start until one was measured, in imports: its three processes import one after the
other."""
FORKED_S = 2.0
"""From a fork until the engine is as far as a cold one is after its imports."""
FREE_CPUS_MIN = 4
"""With fewer processors, two imports at once take as long as one after the other."""
_SECONDS_MAX = 1e6


class ParentForecast:
    """Estimates how long imports and cold starts take on one node. Ignores negative and non-numeric samples."""

    def __init__(self, num_cpus: int) -> None:
        self._num_cpus = num_cpus
        self._imports: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._cold: deque[float] = deque(maxlen=SAMPLES_MAX)

    def note_import(self, seconds: float) -> None:
        """Record how long after its process began a warm parent was ready."""
        if _is_sound(seconds):
            self._imports.append(float(seconds))

    def note_cold(self, seconds: float) -> None:
        """Record how long after its order a cold engine's workers ran; only for one that started while no parent
        imported."""
        if _is_sound(seconds):
            self._cold.append(float(seconds))

    def ready_in_s(self, importing_s: float) -> float:
        """Expected time until a parent is ready that has imported for ``importing_s``. An overdue one is expected to
        need as much time again as it is overdue."""
        remaining_s = self._import_s - importing_s
        return remaining_s if remaining_s > 0 else -remaining_s

    def cold_s(self, importing_s: float) -> float:
        """Expected duration of the imports of a cold start that begins now, beside a parent that has imported for
        ``importing_s``."""
        alone_s = median_low(self._cold) if self._cold else COLD_IMPORTS * self._import_s
        beside_s = 0.0 if self._num_cpus >= FREE_CPUS_MIN else min(alone_s, self.ready_in_s(importing_s))
        return alone_s + beside_s

    def wait_s(self, importing_s: float, *, wait_s_max: float) -> float:
        """How long a start that arrives now waits for the parent at most before it starts cold; 0: it starts cold at
        once.

        It waits if that is expected to be faster, and for no longer than a cold start takes: if the parent is never
        ready, the start takes twice as long.
        """
        cold_s = self.cold_s(importing_s)
        is_sooner = self.ready_in_s(importing_s) + FORKED_S < cold_s
        return min(cold_s, wait_s_max) if is_sooner else 0.0

    def to_record(self) -> dict[str, object]:
        """The samples, for JSON."""
        return {"version": RECORD_VERSION, "import_s": list(self._imports), "cold_s": list(self._cold)}

    def restore(self, record: object) -> None:
        """Take the valid samples of a record and ignore the rest; never raises."""
        if isinstance(record, Mapping) and record.get("version") == RECORD_VERSION:
            for seconds in _numbers(record.get("import_s")):
                self.note_import(seconds)
            for seconds in _numbers(record.get("cold_s")):
                self.note_cold(seconds)

    @property
    def _import_s(self) -> float:
        return median_low(self._imports) if self._imports else IMPORT_S


def _is_sound(seconds: float) -> bool:
    return 0 <= seconds < _SECONDS_MAX


def _numbers(values: object) -> Iterable[float]:
    found = values[-SAMPLES_MAX:] if isinstance(values, list) else []
    return [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
