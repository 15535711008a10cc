"""Has a virtual machine's host back the guest's free memory, so that a load does not wait for it. Linux only.

A host may take free pages back within seconds (virtio's free page reporting). The first touch of such a page costs ten
times what it costs on a machine of one's own, and how many of them a load meets is chance: whatever ran before decides.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sllm_vllm.units import KIB

FREE_SHARE_MAX = 0.8
"""More would push files out of the page cache."""

_TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for offset in range(0, len(memory), mmap.PAGESIZE):
    memory[offset] = 1
"""


def claim_memory(nbytes: int) -> int:
    """Touch so much free memory in another process, which gives it back to the guest at once; returns the bytes."""
    claimed = min(nbytes, int(_free_nbytes() * FREE_SHARE_MAX))
    if claimed > 0:
        subprocess.run([sys.executable, "-S", "-c", _TOUCH, str(claimed)], check=True)
    return claimed


def _free_nbytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * KIB
    return 0
