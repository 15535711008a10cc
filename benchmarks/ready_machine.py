"""The state of the machine's memory that every measurement starts from."""

from __future__ import annotations

from benchmarks.cached_model import weight_files
from benchmarks.claimed_memory import ClaimedMemory
from benchmarks.load_job import Job
from benchmarks.page_cache import prepare


def ready_machine(job: Job) -> float:
    """Bring the job's files into their tier and, if it says so, have free memory at hand; returns their residency.

    Raises:
        PageCacheRefused: the files can't be brought into their tier.
    """
    prepare(job.files, job.tier)
    if job.claims_memory:
        with ClaimedMemory(sum(file.stat().st_size for file in weight_files(job.model))):
            pass
    return prepare(job.files, job.tier)
