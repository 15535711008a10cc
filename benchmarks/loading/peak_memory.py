"""Measures peak memory with the kernel's own high-water mark. Linux only."""

from __future__ import annotations

from pathlib import Path

from sllm_vllm.units import KIB


class PeakMemory:
    """Measures from its construction on. Counts every resident page, including those of mapped files."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is resident now
            self._before = _status("VmRSS")
        except OSError:  # not writable in some containers
            return

    def growth(self) -> int | None:
        """Largest growth of resident memory, in bytes; None if the system does not say."""
        return None if self._before is None else max(_status("VmHWM") - self._before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise OSError(f"/proc/self/status has no {field}")
