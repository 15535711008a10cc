"""What a benchmark of the store asks of a child process, and the answer. Imports no torch; see ``once.py``.

Every measurement has its own process, so that its memory is as fresh as an engine's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.common.supervise import ROOT
from sllm_vllm.config import child_environment

JOB_TIMEOUT_S = 300.0


class StoreJob(BaseModel):
    """One task for one child process.

    ``load``: fill a plain module from a checkpoint. ``memcpy``: copy as many bytes from the pool to fresh memory.
    ``download``: fetch a file in ranges and discard it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["load", "memcpy", "download"]
    checkpoint: Path | None = None
    """A directory with a manifest."""
    config: dict[str, Any] = {}
    """The loader's configuration."""
    device: str = "cpu"
    num_threads: int = 1
    """Threads of ``memcpy``; concurrent requests of ``download``."""
    claims_memory: bool = True
    gate: Path | None = None
    """For ``load``: it creates ``<gate>.ready`` when all is prepared, and starts the clock once ``<gate>`` exists."""
    url: str = ""
    path: str = ""
    nbytes: int = 0
    streams: bool = False
    """``download`` reads answers piece by piece instead of as a whole."""


class StoreAnswer(BaseModel):
    """What a child returns."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    present_s: float = 0.0
    """For ``load``: how long the first access to every page took afterwards."""
    wait_s: float = 0.0
    source: str = ""
    hops: dict[str, Any] = {}


class StoreJobFailed(Exception):
    """A child raised, died or took too long. ``str()`` gives one line."""


def start_store_job(job: StoreJob, answer: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job in a new process; its output goes to a log file next to ``answer``."""
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.store.once", job.model_dump_json(), str(answer)]
    with answer.with_suffix(".log").open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def end_store_job(process: subprocess.Popen[bytes], answer: Path) -> StoreAnswer:
    """Wait for a job's answer.

    Raises:
        StoreJobFailed: the job did not finish.
    """
    try:
        status = process.wait(JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise StoreJobFailed(f"not done after {JOB_TIMEOUT_S:.0f} s") from None
    if status or not answer.exists():
        lines = [line for line in answer.with_suffix(".log").read_text(errors="replace").split("\n") if line.strip()]
        raise StoreJobFailed(lines[-1][:300] if lines else f"it ended with status {status}")
    return StoreAnswer.model_validate_json(answer.read_text())


def run_store_job(job: StoreJob, scratch: Path, environment: Mapping[str, str]) -> StoreAnswer:
    """Do a job in a new process.

    Raises:
        StoreJobFailed: the job did not finish.
    """
    answer = scratch / f"store-{job.action}.json"
    return end_store_job(start_store_job(job, answer, environment), answer)
