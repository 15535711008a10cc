"""Chooses the processors that the loader's own threads run on.

vLLM pins a CPU worker's main thread to its compute cores before it loads the model. Threads inherit that, so readers
would compete with the packing for those cores. The affinity that this process had before is that of its parent.
"""

from __future__ import annotations

import os


def reader_cpus(parent_pid: int) -> set[int]:
    """Processors for readers: the parent's without those this thread is pinned to, or the latter if none are left."""
    own = os.sched_getaffinity(0)
    try:
        allowed = os.sched_getaffinity(parent_pid)
    except OSError:  # the parent is another user's process, or has ended
        return own
    return (allowed - own) or own


def run_on(cpus: set[int]) -> None:
    """Move the calling thread to ``cpus``; it keeps its affinity if the system refuses."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return
