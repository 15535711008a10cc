"""What the benchmark asks of a child process, and what the child answers. Imports neither torch nor vLLM.

Every measurement has its own process. In a process that has loaded before, the allocator hands out memory whose pages
are already there, and a loader that copies looks faster than in a real start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.common.supervise import ROOT
from benchmarks.loading.page_cache import Tier
from sllm_vllm.config import child_environment

CHILD_TIMEOUT_S = 600.0
OURS = "sllm"
OURS_RESIDENT = "sllm store"
"""Our loader, with a daemon that has the checkpoint in memory."""
REFERENCE = "auto lazy"
"""The stock loader with its defaults; the others are compared with it."""

Action = Literal["measure", "digest", "prepare", "worker_environment"]


class Loader(BaseModel):
    """A way to load a model, in terms of vLLM's arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    load_format: str
    extra_config: dict[str, Any] = {}
    engine_args: dict[str, Any] = {}
    needs_cuda: bool = False
    needs_module: str | None = None
    """A package that must be installed."""
    needs_store: bool = False
    """Whether it needs a daemon with the checkpoint resident."""
    is_prepared: bool = False
    """Whether it reads its own files, which have to be written first."""


class Job(BaseModel):
    """One task for one child process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    loader: Loader
    model: Path
    tier: Tier = "warm"
    files: list[Path] = []
    """The files that the loader reads; brought into ``tier`` just before the clock starts."""
    claims_memory: bool = True
    """Whether to make free memory ready first; see ``claimed_memory.py``."""
    target: Path | None = None
    """Where ``prepare`` writes."""
    plain: bool = False
    """Whether to load a module of plain parameters, without vLLM."""
    device: str = "cpu"


class Measurement(BaseModel):
    """One load. The parts add up to ``seconds``; where work overlaps, only the time that the load waited counts."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    """The whole of ``load_model``."""
    construct_s: float = 0.0
    weights_s: float = 0.0
    """For stock loaders, ``load_weights``; for ours, the part that post-processing did not hide."""
    process_s: float = 0.0
    weights_wall_s: float = 0.0
    """From the first read to the last parameter filled."""
    outcome: str = ""
    source: str = ""
    """For our loader, where the bytes came from: ``store`` or ``disk``."""
    residency: float
    """Share of the files in the page cache when the clock started."""
    peak_nbytes: int | None = None
    """Largest resident memory during the load, less what was resident before."""
    disturbance: float = 0.0
    """Share of the processors that other processes used meanwhile."""

    @property
    def rest_s(self) -> float:
        """Everything else: garbage collection, looking up the checkpoint, and so on."""
        return self.seconds - self.construct_s - self.weights_s - self.process_s


class Answer(BaseModel):
    """What a child returns, depending on the action."""

    measurement: Measurement | None = None
    digest: str = ""
    environment: dict[str, str] = {}


class ChildFailed(Exception):
    """A child raised, died or took too long. ``str()`` gives one line."""


def run_child(job: Job, scratch: Path, environment: dict[str, str]) -> Answer:
    """Do a job in a new process.

    Raises:
        ChildFailed: the child did not finish.
    """
    answer, log = scratch / "answer.json", scratch / f"{job.loader.name.replace(' ', '-')}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.loading.once", job.model_dump_json(), str(answer)]
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
