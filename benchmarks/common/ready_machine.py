"""Sets the state of the machine's memory that every measurement starts from."""

from __future__ import annotations

from benchmarks.common.cached_model import weight_files
from benchmarks.loading.claimed_memory import ClaimedMemory
from benchmarks.loading.job import Job
from benchmarks.loading.page_cache import prepare


def ready_machine(job: Job) -> float:
    """Bring the job's files into their tier and, if asked for, make free memory ready; returns the files' residency.

    Raises:
        PageCacheRefused: the files could not be brought into their tier.
    """
    prepare(job.files, job.tier)
    if job.claims_memory:
        with ClaimedMemory(sum(file.stat().st_size for file in weight_files(job.model))):
            pass
    return prepare(job.files, job.tier)
