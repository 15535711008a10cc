"""Makes a virtual machine's host back the guest's free memory, so that a load does not wait for it. Linux only.

A host may take free pages back within seconds (virtio's free page reporting). The first touch of such a page costs ten
times what it costs on a physical machine. How many such pages a load touches is chance: it depends on what ran before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from sllm_vllm.units import KIB

FREE_SHARE_MAX = 0.8
"""Largest share of the free memory to claim; more would push files out of the page cache."""
CLAIMED_MODELS = 2.5
"""Memory to claim, as a multiple of the model's size: what a load may touch, and a little more."""

_HOLD = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for offset in range(0, len(memory), mmap.PAGESIZE):
    memory[offset] = 1
print("held", flush=True)
sys.stdin.read()
"""


class ClaimedMemory:
    """Memory for one load, held by another process. When released, it is free at once and still backed by the host.

    Args:
        model_nbytes: size of the model.
    """

    def __init__(self, model_nbytes: int) -> None:
        self.nbytes = min(int(model_nbytes * CLAIMED_MODELS), int(_free_nbytes() * FREE_SHARE_MAX))
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self.nbytes > 0:
            command = [sys.executable, "-S", "-c", _HOLD, str(self.nbytes)]
            self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._holder.stdout is not None
            self._holder.stdout.readline()  # empty if the process failed for lack of memory: then nothing is held
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Free the memory. Safe to call twice."""
        if self._holder is not None:
            self._holder.communicate()
            self._holder = None


def _free_nbytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * KIB
    return 0
