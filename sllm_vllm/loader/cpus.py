"""On which processors the loader's own threads run.

vLLM pins a CPU worker's main thread to its compute cores before it loads the model, and threads inherit that: readers
would fight the packing for those cores. The parent's affinity is what this process had before.
"""

from __future__ import annotations

import os


def reader_cpus(parent_pid: int) -> set[int]:
    """Processors for readers: those of the parent process without those this thread is pinned to, if any are left."""
    own = os.sched_getaffinity(0)
    try:
        allowed = os.sched_getaffinity(parent_pid)
    except OSError:  # another user's process, or none
        return own
    return (allowed - own) or own


def run_on(cpus: set[int]) -> None:
    """Move the calling thread; it stays where it is if the system refuses."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return
