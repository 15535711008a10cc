"""The report of a load: bytes and seconds of every hop, as one log line and as JSON for other programs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from sllm_vllm.units import format_bps

HopName = Literal["read_disk", "read_cache", "verify", "map", "copy_pool", "copy"]


class Hop(BaseModel):
    """One stage of a load's pipeline. ``busy_s`` is summed over its threads, so it may exceed ``span_s``."""

    model_config = ConfigDict(extra="forbid")

    nbytes: int = 0
    busy_s: float = 0.0
    span_s: float = 0.0
    """From the start of the first step to the end of the last one, including pauses (the next hop may be slower)."""
    limit_bps: float | None = None
    """Bytes per second of this hop alone on this machine, if `sllm-vllm calibrate` has measured it."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share_of_limit(self) -> float | None:
        """Bytes per second over ``span_s``, as a share of the limit; None if no limit was measured."""
        if not self.limit_bps or self.span_s <= 0:
            return None
        return self.nbytes / self.span_s / self.limit_bps


class LoadReport(BaseModel):
    """One rank's load. Seconds are wall time."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = ""
    rank: int = 0
    outcome: Literal["loaded", "converted", "unconverted"]
    source: Literal["store", "disk"] | None = None
    """Where the checkpoint's bytes came from. Also ``store`` if the daemon ended during the load; ``hops`` then show
    how much each source delivered."""
    nbytes: int = 0
    construct_s: float = 0.0
    """Time to build the module, with its parameters still empty."""
    weights_s: float = 0.0
    """From the first read until the last parameter was filled; overlaps with ``process_s``."""
    process_s: float = 0.0
    """Time in vLLM's own post-processing, without waiting for bytes."""
    wait_s: float = 0.0
    """Part of ``total_s`` in which post-processing waited for bytes."""
    total_s: float = 0.0
    """Duration of ``load_model``."""
    hops: dict[HopName, Hop] = {}

    def line(self) -> str:
        """The report's fields for one log line."""
        bps = self.nbytes / self.weights_s if self.weights_s > 0 else None
        hops = " ".join(_hop_field(name, hop) for name, hop in self.hops.items() if hop.nbytes)
        return (
            f"outcome={self.outcome} source={self.source or '-'} rank={self.rank} bytes={self.nbytes} "
            f"rate={format_bps(bps)} "
            f"total_s={self.total_s:.3f} construct_s={self.construct_s:.3f} weights_s={self.weights_s:.3f} "
            f"process_s={self.process_s:.3f} wait_s={self.wait_s:.3f} {hops} checkpoint={self.checkpoint}"
        )

    def write(self, path: Path) -> Path:
        """Write the report as JSON to ``path``, on ranks other than 0 with ``.rank-N`` before the suffix.

        Returns:
            The file that was written.

        Raises:
            OSError: the file can't be written.
        """
        file = path if self.rank == 0 else path.with_name(f"{path.stem}.rank-{self.rank}{path.suffix}")
        file.write_text(self.model_dump_json(indent=2) + "\n")
        return file


def _hop_field(name: str, hop: Hop) -> str:
    share = "" if hop.share_of_limit is None else f"/{hop.share_of_limit:.0%}"
    return f"{name}={hop.nbytes}B/{hop.busy_s:.3f}s{share}"


class HopCounter:
    """Sums up bytes and seconds of each hop. Thread-safe.

    Args:
        limits: bytes per second of each hop alone, where known.
    """

    def __init__(self, limits: Mapping[HopName, float] | None = None) -> None:
        self._lock = threading.Lock()
        self._limits = limits or {}
        self._first_s: dict[HopName, float] = {}
        self.hops: dict[HopName, Hop] = {}

    def add(self, name: HopName, nbytes: int, *, start_s: float, end_s: float) -> None:
        """Count one step of a hop; times are from ``time.perf_counter``."""
        with self._lock:
            hop = self.hops.setdefault(name, Hop(limit_bps=self._limits.get(name)))
            hop.nbytes += nbytes
            hop.busy_s += end_s - start_s
            first_s = self._first_s.setdefault(name, start_s)
            hop.span_s = max(hop.span_s, end_s - first_s)
