"""Whether a start waits for the warm parent that is importing, or begins cold beside it. Pure; asked by ``WarmPool``.

An engine that is forked from the parent is ready a second or two after it; one that is started cold imports vLLM in
three processes, one after the other, and takes processors from the parent meanwhile. Both times are learned from this
node's own imports and cold starts, which the agent keeps over a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median_low

SAMPLES_MAX = 8
RECORD_VERSION = 1
IMPORT_S = 30.0
"""An import, before one was seen here."""
COLD_IMPORTS = 3
"""A cold start before one was seen here, in imports: it has three processes, one after the other."""
FORKED_S = 2.0
"""From a fork to where a cold engine has imported."""
FREE_CPUS_MIN = 4
"""With fewer processors, two that import at once take as long as one after the other."""
_SECONDS_MAX = 1e6


class ParentForecast:
    """How long imports and cold starts take on one node. Samples that are negative or no numbers are passed over."""

    def __init__(self, num_cpus: int) -> None:
        self._num_cpus = num_cpus
        self._imports: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._cold: deque[float] = deque(maxlen=SAMPLES_MAX)

    def note_import(self, seconds: float) -> None:
        """A warm parent was ready so long after its process had begun."""
        if _is_sound(seconds):
            self._imports.append(float(seconds))

    def note_cold(self, seconds: float) -> None:
        """A cold engine, started while no parent imported, had its workers running so long after its order."""
        if _is_sound(seconds):
            self._cold.append(float(seconds))

    def ready_in_s(self, importing_s: float) -> float:
        """Until a parent is ready that has imported for so long. One that is late is trusted less the later it is."""
        remaining_s = self._import_s - importing_s
        return remaining_s if remaining_s > 0 else -remaining_s

    def cold_s(self, importing_s: float) -> float:
        """What a cold start's imports take that begins now, beside a parent that has imported for so long."""
        alone_s = median_low(self._cold) if self._cold else COLD_IMPORTS * self._import_s
        beside_s = 0.0 if self._num_cpus >= FREE_CPUS_MIN else min(alone_s, self.ready_in_s(importing_s))
        return alone_s + beside_s

    def wait_s(self, importing_s: float, *, wait_s_max: float) -> float:
        """How long a start that comes now waits for that parent at most, before it begins cold; 0: it does so at once.

        It waits where that is expected to be sooner, and no longer than a cold start takes: if the parent is never
        ready, that makes the start twice as long.
        """
        cold_s = self.cold_s(importing_s)
        is_sooner = self.ready_in_s(importing_s) + FORKED_S < cold_s
        return min(cold_s, wait_s_max) if is_sooner else 0.0

    def to_record(self) -> dict[str, object]:
        """What was learned, for JSON."""
        return {"version": RECORD_VERSION, "import_s": list(self._imports), "cold_s": list(self._cold)}

    def restore(self, record: object) -> None:
        """Take what is sound in a record, and nothing more; never raises."""
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
