"""What a load did: bytes and seconds of every hop. Logged in one line; JSON for whoever learns from it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sllm_vllm.units import format_bps

HopName = Literal["read_disk", "read_cache", "verify", "copy", "process"]


class Hop(BaseModel):
    """One stage of the pipeline. ``busy_s`` is summed over its threads, so it may exceed the wall time."""

    model_config = ConfigDict(extra="forbid")

    nbytes: int = 0
    busy_s: float = 0.0
    limit_bps: float | None = None
    """What this hop can do alone on this machine, where that was measured."""

    @property
    def bps(self) -> float | None:
        """Bytes a second of one thread while it was busy; None before anything passed."""
        return self.nbytes / self.busy_s if self.busy_s > 0 else None


class LoadReport(BaseModel):
    """One rank's load. Seconds are wall time unless said otherwise."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = ""
    rank: int = 0
    outcome: Literal["loaded", "converted", "unconverted"]
    nbytes: int = 0
    construct_s: float = 0.0
    """Building the module, its parameters still empty."""
    weights_s: float = 0.0
    """From the first read to the last parameter filled; it overlaps with ``process_s``."""
    process_s: float = 0.0
    """vLLM's own post-processing, while nothing was waited for."""
    wait_s: float = 0.0
    """Part of ``total_s`` in which post-processing stood still, waiting for bytes."""
    total_s: float = 0.0
    """The whole of ``load_model``."""
    hops: dict[HopName, Hop] = {}

    def line(self) -> str:
        """Fields for one log line."""
        bps = self.nbytes / self.weights_s if self.weights_s > 0 else None
        hops = " ".join(f"{name}={hop.nbytes}B/{hop.busy_s:.3f}s" for name, hop in self.hops.items() if hop.nbytes)
        return (
            f"outcome={self.outcome} rank={self.rank} bytes={self.nbytes} rate={format_bps(bps)} "
            f"total_s={self.total_s:.3f} construct_s={self.construct_s:.3f} weights_s={self.weights_s:.3f} "
            f"process_s={self.process_s:.3f} wait_s={self.wait_s:.3f} {hops} checkpoint={self.checkpoint}"
        )

    def write(self, path: Path) -> Path:
        """Write it as JSON; ranks other than 0 get ``.rank-N`` before the suffix. Returns the file.

        Raises:
            OSError: the file can't be written.
        """
        file = path if self.rank == 0 else path.with_name(f"{path.stem}.rank-{self.rank}{path.suffix}")
        file.write_text(self.model_dump_json(indent=2) + "\n")
        return file


class HopCounter:
    """Adds up what the hops did; called from every thread of a pipeline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hops: dict[HopName, Hop] = {}

    def add(self, name: HopName, nbytes: int, busy_s: float) -> None:
        """Count one step of a hop."""
        with self._lock:
            hop = self.hops.setdefault(name, Hop())
            hop.nbytes += nbytes
            hop.busy_s += busy_s
