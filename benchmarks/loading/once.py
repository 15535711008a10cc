"""The child process of the load benchmark: does one job, then ends. `__main__.py` starts it; see `job.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.loading.job import Answer, Job


def main() -> None:
    """Command line: a job as JSON, and the file for the answer."""
    job = Job.model_validate_json(sys.argv[1])
    Path(sys.argv[2]).write_text(do(job).model_dump_json())


def do(job: Job) -> Answer:
    """Do a job in this process, which must not have done one before."""
    if job.plain:
        from benchmarks.loading import plain as way
    else:
        from benchmarks.loading import in_vllm as way  # type: ignore[no-redef]
    match job.action:
        case "measure":
            return Answer(measurement=way.measure(job))
        case "digest":
            return Answer(digest=way.digest(job))
        case "prepare":
            way.prepare(job)
            return Answer()
        case "worker_environment":
            return Answer(environment=way.worker_environment())


if __name__ == "__main__":
    main()
