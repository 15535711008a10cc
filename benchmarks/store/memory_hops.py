"""Measures the store's pool to parameters, by mapping and by copying, and disk to pool, with the limits of each."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict

from benchmarks.store.daemon import StoreDaemon
from benchmarks.store.device_limits import read_direct_s
from benchmarks.store.job import StoreJob, StoreJobFailed
from benchmarks.store.setting import (
    SMALL_PAGE_SLOT_NBYTES,
    StoreSetting,
    data_nbytes,
    drop_pages,
    load_job,
    partition_file,
)
from benchmarks.store.shares import Share
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
from sllm_vllm.store.calibrate import MeasurePlan, measure_device
from sllm_vllm.store.store import READERS_DEFAULT

MAP_GOAL_S = 0.050
COPY_GOAL = 0.90
DISK_GOAL = 0.95
READ_DEPTHS = (1, 2, 4, 8)

Seconds = dict[str, list[float]]


def memory_shares(setting: StoreSetting) -> list[Share]:
    """Measure from the pool to parameters, with the pool in huge pages and in 4 KiB pages."""
    checkpoint = setting.checkpoint("store", "resident")
    shares = []
    for pages, slot_nbytes in (("huge pages", CHUNK_NBYTES_DEFAULT), ("4 KiB pages", SMALL_PAGE_SLOT_NBYTES)):
        with setting.daemon("store", nbytes=data_nbytes(checkpoint), slot_bytes=slot_nbytes) as daemon:
            daemon.prefetch_s(checkpoint.path.name)
            page_nbytes = daemon.status()["pool"]["page_nbytes"]
            found: Seconds = defaultdict(list)
            for number in range(1, setting.rounds + 1):
                setting.say(f"round {number} of {setting.rounds}: pool in {pages} ({page_nbytes} bytes)")
                _memory_round(setting, checkpoint, daemon, found=found)
        shares += _memory_report(found, f"{pages} ({page_nbytes // 1024} KiB)")
    return shares


def _memory_round(setting: StoreSetting, checkpoint: Checkpoint, daemon: StoreDaemon, *, found: Seconds) -> None:
    store_dir = daemon.config.store_dir
    for way, num_threads in (("map", 1), ("copy", 2)):
        answer = setting.run_job(load_job(checkpoint.path, store_dir, pool=way))
        if answer.source != "store":
            raise StoreJobFailed(f"{way}: the bytes came from the {answer.source}")
        found[way].append(answer.seconds)
        found[f"{way} present"].append(answer.present_s)
        job = StoreJob(
            action="memcpy",
            config={"store_dir": str(store_dir)},
            num_threads=num_threads,
            nbytes=data_nbytes(checkpoint),
        )
        found[f"memcpy {num_threads}"].append(setting.run_job(job).seconds)


def _memory_report(found: Seconds, pages: str) -> list[Share]:
    memcpy = {count: found[f"memcpy {count}"] for count in (1, 2)}
    best = min(memcpy, key=lambda count: statistics.median(memcpy[count]))
    present = ", ".join(f"{seconds:.3f}" for seconds in found["map present"])
    return [
        Share(
            name=f"(a) HOST to parameters by mapping, {pages}",
            rule="seconds",
            goal=MAP_GOAL_S,
            ours_s=found["map"],
            note=f"then every page's first use takes {present} s",
        ),
        Share(
            name=f"(b) HOST to parameters by copying, {pages}, of one thread's memcpy",
            rule="share",
            goal=COPY_GOAL,
            ours_s=found["copy"],
            limit_s=memcpy[1],
        ),
        Share(
            name=f"(b) HOST to parameters by copying, {pages}, of the best memcpy ({best} threads)",
            rule="share",
            goal=COPY_GOAL,
            ours_s=found["copy"],
            limit_s=memcpy[best],
        ),
    ]


def disk_shares(setting: StoreSetting) -> list[Share]:
    """Measure disk to pool, with the default number of readers, the calibrated one, and the deepest raw read's."""
    checkpoint = setting.checkpoint("store", "resident")
    file, state_dir = partition_file(checkpoint), setting.scratch / "store" / ".store"
    setting.say("calibrating the disk")
    calibration = measure_device(state_dir, file, MeasurePlan())
    readers = {"by default": READERS_DEFAULT, "calibrated": calibration.readers, "at most": READ_DEPTHS[-1]}
    ours: Seconds = defaultdict(list)
    limits: dict[int, list[float]] = defaultdict(list)
    for number in range(1, setting.rounds + 1):
        for name, count in readers.items():
            with setting.daemon("store", nbytes=data_nbytes(checkpoint), readers=count) as daemon:
                setting.say(f"round {number} of {setting.rounds}: disk to pool, {count} readers ({name})")
                jobs: list[int | None] = [*READ_DEPTHS, None]
                random.Random(f"{number} {name}").shuffle(jobs)  # later reads may find the file in the host's cache
                for depth in jobs:
                    drop_pages(checkpoint)
                    if depth is None:
                        ours[name].append(daemon.prefetch_s(checkpoint.path.name))
                    else:
                        limits[depth].append(read_direct_s(file, depth))
    best = min(limits, key=lambda depth: statistics.median(limits[depth]))
    pairs = [statistics.mean(limits[best][i : i + len(readers)]) for i in range(0, len(limits[best]), len(readers))]
    return [
        Share(
            name=f"(c) DISK to the pool, readers {name} ({readers[name]}), of an O_DIRECT read at depth {best}",
            rule="share",
            goal=DISK_GOAL,
            ours_s=ours[name],
            limit_s=pairs,
            note=f"calibrated reads: {[(f.depth, f.chunk_nbytes, round(f.bps / 1e6)) for f in calibration.reads]}",
        )
        for name in readers
    ]
