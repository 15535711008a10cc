"""An engine's log lines as timed phases of its start. Pure; fed by the agent while the log grows.

Lines are matched loosely, on words that have been stable: if another version of vLLM says it differently, the phase's
time goes to the one before it, and nothing else happens. No line ever raises. Tried on logs of vLLM 0.32 on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

LINE_MAX = 600
"""Characters of a line that are looked at: vLLM prints its whole configuration in one."""


class Phase(Enum):
    """What an engine is doing, in the words of a progress line."""

    PROCESS = "starting the process"
    """From the order until the process runs."""
    PARENT = "waiting for the warm parent"
    """That imports; no part of what a start takes where there is one."""
    IMPORTS = "importing"
    """Until its API server has read its arguments. A forked engine has none."""
    INSPECT = "inspecting the model class"
    """vLLM asks what an architecture that it has not seen can do. A forked engine says how long that took; in one that
    was started cold it counts as ``WORKERS``."""
    WORKERS = "starting workers"
    """Reading the model's configuration; processes and imports of engine core and workers."""
    INIT = "initialising"
    """Workers find each other; the module is built, still empty."""
    WEIGHTS = "loading weights"
    """Reading and copying them, with vLLM's post-processing."""
    PROFILE = "measuring memory"
    """And making the KV cache."""
    COMPILE = "compiling"
    WARMUP = "warming up"
    GRAPHS = "capturing graphs"
    HTTP = "opening the port"
    READY = "ready"


RANKS = {phase: rank for rank, phase in enumerate(Phase)} | dict.fromkeys(
    (Phase.PROFILE, Phase.COMPILE, Phase.WARMUP, Phase.GRAPHS), 7
)
"""A start never goes back to a phase of lower rank (a slower worker says late what another said before). Within a
rank it goes to and fro: on a GPU compiling is part of profiling, on a CPU it comes after the KV cache."""


class Mark(NamedTuple):
    """A line after which a phase begins."""

    pattern: re.Pattern[str]
    phase: Phase


def _mark(pattern: str, phase: Phase) -> Mark:
    return Mark(re.compile(pattern, re.IGNORECASE), phase)


MARKS = (
    # The first that matches counts. These two quote what the user wrote, so they must come first.
    _mark(r"non-default args|vLLM (API )?server version", Phase.WORKERS),
    _mark(r"Initializing a V\d+ LLM engine", Phase.WORKERS),
    _mark(r"world_size=\d+ rank=\d+", Phase.INIT),
    _mark(r"event=load_model |Model loading took|Available KV cache|KV cache layout|GiB for KV cache", Phase.PROFILE),
    _mark(r"Starting to load model|Loading weights|Loading .*checkpoint shards", Phase.WEIGHTS),
    _mark(r"KV cache size|Warming up done", Phase.WARMUP),
    _mark(r"torch\.compile( and initial profiling.*)? (took|takes)|Initial profiling.* took", Phase.PROFILE),
    _mark(r"Starting torch\.compile|for vLLM's torch\.compile|Dynamo bytecode|model for the compil", Phase.COMPILE),
    _mark(r"Compile and warming up|kernel warmup starting|Running FlashInfer autotune", Phase.WARMUP),
    _mark(r"Graph capturing finished", Phase.WARMUP),
    _mark(r"Capturing .*graph", Phase.GRAPHS),
    _mark(r"init engine .*took", Phase.HTTP),
    _mark(r"Application startup complete", Phase.READY),
)

TOLD = (
    _mark(r"event=inspect_model seconds=(\d+(?:\.\d+)?)", Phase.INSPECT),
    _mark(r"Initializing model took (\d+(?:\.\d+)?) s", Phase.INIT),
    _mark(r"event=load_model .*construct_s=(\d+(?:\.\d+)?)", Phase.INIT),
    _mark(r"Graph capturing finished in (\d+(?:\.\d+)?) s", Phase.GRAPHS),
)
"""Lines that tell how long a phase took that no line began: so much of the time up to now was that phase's."""

REPORT = re.compile(r"event=load_model .*rank=(\d+) bytes=(\d+)")
"""The line of our ``LoadReport``, one from each worker."""


@dataclass(frozen=True, slots=True)
class StartTimings:
    """How far a start is, and what it spent its time on.

    ``seconds`` has the phases that there were, in the order of ``Phase``; they add up to ``total_s``, the seconds since
    the order. ``nbytes`` of weights were loaded by all workers; None if our loader did not say.
    """

    phase: Phase
    seconds: Mapping[Phase, float]
    total_s: float
    nbytes: int | None

    @property
    def is_ready(self) -> bool:
        """Whether the start came to its end."""
        return self.phase is Phase.READY


class StartPhases:
    """The phases of one start. All times are seconds since the order; one that goes back counts as no time."""

    def __init__(self) -> None:
        self.phase = Phase.PROCESS
        self._seconds: dict[Phase, float] = {}
        self._noted_s = 0.0
        self._nbytes: dict[str, int] = {}

    def parent_awaited(self, at_s: float) -> None:
        """Its process will be forked from a warm parent that still imports."""
        self._begin(Phase.PARENT, at_s)

    def process_started(self, at_s: float) -> None:
        """The process runs; without this, its first line says so."""
        self._begin(Phase.IMPORTS, at_s)

    def became_ready(self, at_s: float) -> None:
        """It is healthy; without this, its log says so. What comes later is no part of the start."""
        self._begin(Phase.READY, at_s)

    def note(self, line: str, at_s: float) -> None:
        """Its log has one more line, or a progress bar's next state. Any text will do."""
        if self.phase is Phase.READY:
            return
        line = line[:LINE_MAX]
        self._begin(Phase.IMPORTS, at_s)  # changes nothing but before the first line
        self._take_told(line)
        report = REPORT.search(line)
        if report is not None:
            self._nbytes[report[1]] = int(report[2])
        phase = next((mark.phase for mark in MARKS if mark.pattern.search(line)), None)
        if phase is not None:
            self._begin(phase, at_s)

    def timings(self, at_s: float) -> StartTimings:
        """How far it is now."""
        seconds = dict(self._seconds)
        if self.phase is not Phase.READY:
            seconds[self.phase] = seconds.get(self.phase, 0.0) + max(0.0, at_s - self._noted_s)
        ordered = {phase: seconds[phase] for phase in Phase if phase in seconds}
        return StartTimings(
            phase=self.phase,
            seconds=ordered,
            total_s=sum(ordered.values()),
            nbytes=sum(self._nbytes.values()) if self._nbytes else None,
        )

    def _begin(self, phase: Phase, at_s: float) -> None:
        """Up to now it was in its phase; now it is in this one, unless that would be a step back."""
        if self.phase is Phase.READY:
            return
        passed_s = max(0.0, at_s - self._noted_s)
        self._noted_s += passed_s
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + passed_s
        if RANKS[phase] >= RANKS[self.phase]:
            self.phase = phase

    def _take_told(self, line: str) -> None:
        """Give a phase the time that it is told to have had, at the cost of the phase that was thought to run."""
        for pattern, phase in TOLD:
            told = pattern.search(line)
            if told is not None and phase is not self.phase:
                taken_s = min(float(told[1]), self._seconds.get(self.phase, 0.0))
                self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) - taken_s
                self._seconds[phase] = self._seconds.get(phase, 0.0) + taken_s


def timings_of(lines: Iterable[tuple[float, str]]) -> StartTimings:
    """The phases of a log that is there already: (seconds since the order, line)."""
    phases, at_s = StartPhases(), 0.0
    for at_s, line in lines:
        phases.note(line, at_s)
    return phases.timings(at_s)
