"""What the benchmark asks of a child process, and what comes back. Imports neither torch nor vLLM.

Every measurement has a process of its own: in one that has loaded before, the allocator hands out memory whose pages
are there already, and a loader that copies looks faster than it is in a real start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.page_cache import Tier
from benchmarks.supervise import ROOT
from sllm_vllm.config import child_environment

CHILD_TIMEOUT_S = 600.0
OURS = "sllm"
OURS_RESIDENT = "sllm store"
"""Ours, with a daemon that has the checkpoint in memory."""
REFERENCE = "auto lazy"
"""The stock loader as it comes: what the others are compared with."""

Action = Literal["measure", "digest", "prepare", "worker_environment"]


class Loader(BaseModel):
    """A way to load a model, as vLLM is told it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    load_format: str
    extra_config: dict[str, Any] = {}
    engine_args: dict[str, Any] = {}
    needs_cuda: bool = False
    needs_module: str | None = None
    """A package that must be installed."""
    needs_store: bool = False
    """A daemon runs on the store, with the checkpoint resident."""
    is_prepared: bool = False
    """It reads files of its own, which have to be written first."""


class Job(BaseModel):
    """One task of one child."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    loader: Loader
    model: Path
    tier: Tier = "warm"
    files: list[Path] = []
    """What the loader reads, brought into ``tier`` just before the clock starts."""
    claims_memory: bool = True
    """Whether free memory is made ready first, see ``claimed_memory.py``."""
    target: Path | None = None
    """Where ``prepare`` writes."""
    plain: bool = False
    """A module of plain parameters, without vLLM."""
    device: str = "cpu"


class Measurement(BaseModel):
    """One load. The parts add up to ``seconds``; where work overlaps, only what the load stood still for counts."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    """The whole of ``load_model``."""
    construct_s: float = 0.0
    weights_s: float = 0.0
    """The stock loaders' ``load_weights``; of ours, the part that post-processing did not hide."""
    process_s: float = 0.0
    weights_wall_s: float = 0.0
    """From the first read to the last parameter filled."""
    outcome: str = ""
    source: str = ""
    """Of ours: where the bytes came from, ``store`` or ``disk``."""
    residency: float
    """Share of the files in the page cache when the clock started."""
    peak_nbytes: int | None = None
    """Largest resident memory during the load, less what was resident before."""
    disturbance: float = 0.0
    """Share of the processors that other processes took meanwhile."""

    @property
    def rest_s(self) -> float:
        """Garbage collection, looking up the checkpoint, and what else there is."""
        return self.seconds - self.construct_s - self.weights_s - self.process_s


class Answer(BaseModel):
    """What a child leaves behind, depending on the action."""

    measurement: Measurement | None = None
    digest: str = ""
    environment: dict[str, str] = {}


class ChildFailed(Exception):
    """A child raised, died or took too long. ``str()`` is one line."""


def run_child(job: Job, scratch: Path, environment: dict[str, str]) -> Answer:
    """Do a job in a new process.

    Raises:
        ChildFailed: it did not come to its end.
    """
    answer, log = scratch / "answer.json", scratch / f"{job.loader.name.replace(' ', '-')}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.load_once", job.model_dump_json(), str(answer)]
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=child_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=CHILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"not done after {CHILD_TIMEOUT_S:.0f} s") from None
    if done.returncode or not answer.exists():
        raise ChildFailed(_last_line(log) or f"it ended with status {done.returncode}")
    return Answer.model_validate_json(answer.read_text())


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
