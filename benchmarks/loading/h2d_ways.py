"""Compares ways from the store's pool to a CUDA device with a copy from page-locked memory. Needs a GPU and torch only.

``ring``: through a ring of page-locked buffers. ``register``: slots are page-locked as they arrive. ``ipc``: another
process, which has page-locked the pool beforehand, copies into this process's memory. ``loading.py --no-vllm`` runs
this comparison, too.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.supervise import CACHE_DEFAULT, Workspace, run_supervised
from benchmarks.store.daemon import DaemonFailed
from benchmarks.store.device_limits import measure_limits
from benchmarks.store.hops import setting_in, write_lines
from benchmarks.store.job import StoreJobFailed
from benchmarks.store.setting import StoreSetting, data_nbytes, load_job, partition_file
from benchmarks.store.shares import Share

WAYS = ("ring", "register", "ipc")
H2D_GOAL = 0.90


def compare_ways(setting: StoreSetting, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Load a resident checkpoint to the first device by each way, round by round; return the lines of JSON."""
    checkpoint = setting.checkpoint("store", "resident")
    found: dict[str, list[float]] = defaultdict(list)
    limit_s: list[float] = []
    with setting.daemon("store", nbytes=data_nbytes(checkpoint)) as daemon:
        daemon.prefetch_s(checkpoint.path.name)
        for number in range(1, setting.rounds + 1):
            limit_s.append(measure_limits(partition_file(checkpoint), with_cuda=True).copy_s)
            for way in ways:
                setting.say(f"round {number} of {setting.rounds}: {way}")
                job = load_job(checkpoint.path, daemon.config.store_dir, h2d=way)
                found[way].append(setting.run_job(job.model_copy(update={"device": "cuda:0"})).seconds)
    shares = [
        Share(
            name=f"(h) HOST to GPU by {way}, of a copy out of page-locked memory",
            rule="share",
            goal=H2D_GOAL,
            ours_s=seconds,
            limit_s=limit_s,
        )
        for way, seconds in found.items()
    ]
    for share in shares:
        setting.say(share.line())
    return [share.as_json() for share in shares]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h2d", choices=WAYS, action="append", help="only this way; may be repeated (all)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a way (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the lines of JSON (default: standard output)")
    parser.add_argument("--cache", type=Path, default=CACHE_DEFAULT, help="directory for the checkpoint")
    arguments = parser.parse_args()
    if arguments.json is not None:
        arguments.json = arguments.json.resolve()

    def work(workspace: Workspace) -> int:
        setting = setting_in(workspace, rounds=arguments.rounds)
        try:
            lines = compare_ways(setting, arguments.h2d or WAYS)
        except (DaemonFailed, StoreJobFailed) as error:
            print(error)
            return 1
        write_lines(lines, arguments.json)
        return 0

    return run_supervised(work, arguments.cache.resolve())


if __name__ == "__main__":
    raise SystemExit(main())
