"""Turns an engine's log lines into the timed phases of its start. Pure; fed by the agent while the log grows.

Lines are matched loosely, on words that have been stable: if another version of vLLM words a line differently, the
phase's time is counted in the phase before it, and nothing else changes. No line raises. Tested with logs of vLLM 0.32
on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

LINE_MAX = 600
"""Characters of a line that are examined: vLLM prints its whole configuration in one line."""


class StartPhase(Enum):
    """What an engine is doing, in the words of a progress line."""

    PROCESS = "starting the process"
    """From the order until the process runs."""
    PARENT = "waiting for the warm parent"
    """While the parent is still importing; absent where the parent was ready."""
    IMPORTS = "importing"
    """Until its API server has read its arguments. Absent in a forked engine."""
    INSPECT = "inspecting the model class"
    """vLLM finds out what an architecture that it has not seen before can do. A forked engine logs how long that took;
    in a cold one it is part of ``WORKERS``."""
    WORKERS = "starting workers"
    """Reading the model's configuration; starting the processes of engine core and workers, and their imports."""
    INIT = "initialising"
    """Workers connect to each other; the module is built, still empty."""
    WEIGHTS = "loading weights"
    """Reading and copying them, with vLLM's post-processing."""
    PROFILE = "measuring memory"
    """And allocating the KV cache."""
    COMPILE = "compiling"
    WARMUP = "warming up"
    GRAPHS = "capturing graphs"
    HTTP = "opening the port"
    READY = "ready"


RANKS = {phase: rank for rank, phase in enumerate(StartPhase)} | dict.fromkeys(
    (StartPhase.PROFILE, StartPhase.COMPILE, StartPhase.WARMUP, StartPhase.GRAPHS), 7
)
"""A start never returns to a phase of lower rank, because a slower worker may log late what another logged before.
Phases of equal rank may alternate: on a GPU compiling is part of profiling, on a CPU it comes after the KV cache."""


class Mark(NamedTuple):
    """A pattern of a log line, and the phase that begins with that line."""

    pattern: re.Pattern[str]
    phase: StartPhase


def _mark(pattern: str, phase: StartPhase) -> Mark:
    return Mark(re.compile(pattern, re.IGNORECASE), phase)


MARKS = (
    # The first match wins. The first two match lines that quote the user's arguments, so they must come first.
    _mark(r"non-default args|vLLM (API )?server version", StartPhase.WORKERS),
    _mark(r"Initializing a V\d+ LLM engine", StartPhase.WORKERS),
    _mark(r"world_size=\d+ rank=\d+", StartPhase.INIT),
    _mark(
        r"event=load_model |Model loading took|Available KV cache|KV cache layout|GiB for KV cache", StartPhase.PROFILE
    ),
    _mark(r"Starting to load model|Loading weights|Loading .*checkpoint shards", StartPhase.WEIGHTS),
    _mark(r"KV cache size|Warming up done", StartPhase.WARMUP),
    _mark(r"torch\.compile( and initial profiling.*)? (took|takes)|Initial profiling.* took", StartPhase.PROFILE),
    _mark(
        r"Starting torch\.compile|for vLLM's torch\.compile|Dynamo bytecode|model for the compil", StartPhase.COMPILE
    ),
    _mark(r"Compile and warming up|kernel warmup starting|Running FlashInfer autotune", StartPhase.WARMUP),
    _mark(r"Graph capturing finished", StartPhase.WARMUP),
    _mark(r"Capturing .*graph", StartPhase.GRAPHS),
    _mark(r"init engine .*took", StartPhase.HTTP),
    _mark(r"Application startup complete", StartPhase.READY),
)

TOLD = (
    _mark(r"event=inspect_model seconds=(\d+(?:\.\d+)?)", StartPhase.INSPECT),
    _mark(r"Initializing model took (\d+(?:\.\d+)?) s", StartPhase.INIT),
    _mark(r"event=load_model .*construct_s=(\d+(?:\.\d+)?)", StartPhase.INIT),
    _mark(r"Graph capturing finished in (\d+(?:\.\d+)?) s", StartPhase.GRAPHS),
)
"""Lines that give the duration of a phase whose beginning has no line: that much of the time so far was that
phase's."""

REPORT = re.compile(r"event=load_model .*rank=(\d+) bytes=(\d+)")
"""The line of our ``LoadReport``; each worker prints one."""


@dataclass(frozen=True, slots=True)
class StartTimings:
    """How far a start is, and how long each phase took.

    ``seconds`` has the phases that occurred, in the order of ``StartPhase``; they add up to ``total_s``, the seconds
    since the order. ``nbytes`` is the size of the weights that all workers loaded; None if our loader did not report
    it.
    """

    phase: StartPhase
    seconds: Mapping[StartPhase, float]
    total_s: float
    nbytes: int | None

    @property
    def is_ready(self) -> bool:
        """Whether the start is complete."""
        return self.phase is StartPhase.READY


class StartPhases:
    """The phases of one start. All times are seconds since the order; a step backwards counts as zero."""

    def __init__(self) -> None:
        self.phase = StartPhase.PROCESS
        self._seconds: dict[StartPhase, float] = {}
        self._noted_s = 0.0
        self._nbytes: dict[str, int] = {}

    def parent_awaited(self, at_s: float) -> None:
        """The engine waits to be forked from a warm parent that is still importing."""
        self._begin(StartPhase.PARENT, at_s)

    def process_started(self, at_s: float) -> None:
        """The process runs; without this call, its first log line shows that."""
        self._begin(StartPhase.IMPORTS, at_s)

    def became_ready(self, at_s: float) -> None:
        """The engine is healthy; without this call, its log shows that. Later lines are not part of the start."""
        self._begin(StartPhase.READY, at_s)

    def note(self, line: str, at_s: float) -> None:
        """Take one more log line, or a progress bar's next state. Any text is accepted."""
        if self.phase is StartPhase.READY:
            return
        line = line[:LINE_MAX]
        self._begin(StartPhase.IMPORTS, at_s)  # takes effect only at the first line
        self._take_told(line)
        report = REPORT.search(line)
        if report is not None:
            self._nbytes[report[1]] = int(report[2])
        phase = next((mark.phase for mark in MARKS if mark.pattern.search(line)), None)
        if phase is not None:
            self._begin(phase, at_s)

    def timings(self, at_s: float) -> StartTimings:
        """The timings so far."""
        seconds = dict(self._seconds)
        if self.phase is not StartPhase.READY:
            seconds[self.phase] = seconds.get(self.phase, 0.0) + max(0.0, at_s - self._noted_s)
        ordered = {phase: seconds[phase] for phase in StartPhase if phase in seconds}
        return StartTimings(
            phase=self.phase,
            seconds=ordered,
            total_s=sum(ordered.values()),
            nbytes=sum(self._nbytes.values()) if self._nbytes else None,
        )

    def _begin(self, phase: StartPhase, at_s: float) -> None:
        """Count the time so far in the current phase, and enter this one unless that would be a step back."""
        if self.phase is StartPhase.READY:
            return
        passed_s = max(0.0, at_s - self._noted_s)
        self._noted_s += passed_s
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + passed_s
        if RANKS[phase] >= RANKS[self.phase]:
            self.phase = phase

    def _take_told(self, line: str) -> None:
        """Move the duration that a line gives for a phase to that phase, out of the time counted in the current one."""
        for pattern, phase in TOLD:
            told = pattern.search(line)
            if told is not None and phase is not self.phase:
                taken_s = min(float(told[1]), self._seconds.get(self.phase, 0.0))
                self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) - taken_s
                self._seconds[phase] = self._seconds.get(phase, 0.0) + taken_s


def timings_of(lines: Iterable[tuple[float, str]]) -> StartTimings:
    """The timings of a complete log, given as (seconds since the order, line)."""
    phases, at_s = StartPhases(), 0.0
    for at_s, line in lines:
        phases.note(line, at_s)
    return phases.timings(at_s)
