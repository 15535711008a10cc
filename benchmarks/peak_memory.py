"""How much memory something needs at its peak, by the kernel's own high-water mark. Linux only."""

from __future__ import annotations

from pathlib import Path

from sllm_vllm.units import KIB


class PeakMemory:
    """Measures from its making on. Counts every resident page, those of mapped files too."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the mark is set to what is resident now
            self._before = _status("VmRSS")
        except OSError:  # not ours to write, in some containers
            return

    def growth(self) -> int | None:
        """Bytes by which resident memory grew at most; None where the system does not tell."""
        return None if self._before is None else max(_status("VmHWM") - self._before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise OSError(f"/proc/self/status has no {field}")
