"""Decides whether a load's bytes come from the store or the disk, and puts source, feed and sink together."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.checkpoint.repository import VerifiedMarks
from sllm_vllm.config import LoaderConfig
from sllm_vllm.errors import (
    CheckpointError,
    CheckpointMissing,
    CheckpointUnreadable,
    RemoteError,
    StoreError,
    StoreUnavailable,
)
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.pipeline import ChunkPipeline, DiskSource
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import ChunkSink, HostSink
from sllm_vllm.loader.span_lease import SpanLease, open_lease
from sllm_vllm.loader.span_ways import CopyWay, MapWay, RegisterWay, SpanWay
from sllm_vllm.loader.store_feed import ChunkFeed, StoreFeed
from sllm_vllm.units import MIB

WINDOW_NBYTES = 64 * MIB
"""How far readers may run ahead of the consumer. A larger window hides longer stalls, but takes as much more memory."""

MEND_STORE = "start `sllm-vllm store serve`, or convert the model (`sllm-vllm convert`)"

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to load, and how."""

    partition: RankPartition
    plan: LoadPlan
    config: LoaderConfig
    counter: HopCounter

    @property
    def window(self) -> int:
        """Chunks that may be begun ahead of the consumer; at least two, so that reading never pauses."""
        return max(2, WINDOW_NBYTES // self.plan.chunk_nbytes)

    @property
    def is_on_disk(self) -> bool:
        """Whether this machine has the partition's file, readable or not. Else only the store can provide its bytes."""
        try:
            os.lstat(self.partition.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # reading the file will raise the error
        return True


@dataclass(frozen=True, slots=True)
class OpenFeed:
    """A running feed, and the sink that it fills."""

    sink: ChunkSink
    feed: ChunkFeed
    source: Literal["store", "disk"]


@contextlib.contextmanager
def open_feed(job: LoadJob, device: torch.device) -> Iterator[OpenFeed]:
    """Begin to bring a partition's bytes to a device: from the store if it has them, else from the disk.

    Raises:
        CheckpointError: neither can provide them.
    """
    lease = lease_or_none(job, hold=device.type != "cuda" and job.config.pool == "map")
    if lease is None:
        sink = _sink_for(job, device)
        with disk_feed(job, sink, job.plan.order) as pipeline:
            yield OpenFeed(sink, pipeline, "disk")
        return
    with contextlib.ExitStack() as stack:
        stack.callback(lease.end_receiving)
        sink, way = _store_way(job, lease, device)
        yield OpenFeed(sink, stack.enter_context(store_feed(job, lease, sink, way=way)), "store")


def lease_or_none(job: LoadJob, *, hold: bool) -> SpanLease | None:
    """A lease on the partition, or None if the bytes have to come from the disk.

    Args:
        hold: ask for spans that may be mapped for as long as they are needed.

    Raises:
        CheckpointMissing: the store can't provide the partition, and it is not on this machine's disk.
    """
    if not job.config.store:
        return None
    try:
        return open_lease(job.partition, job.config, hold=hold)
    except StoreUnavailable as error:
        _tell_unused_once(error.path, error.problem)
        problem = error.problem
    except (StoreError, CheckpointError, RemoteError) as error:
        logger.warning("event=store used=no reason=%r", str(error))
        problem = str(error)
    if not job.is_on_disk:
        raise CheckpointMissing(job.partition.path, f"it is not on this machine's disk, and {problem}", MEND_STORE)
    return None


@contextlib.contextmanager
def disk_feed(job: LoadJob, sink: ChunkSink, order: Sequence[int]) -> Iterator[ChunkPipeline]:
    """Read chunks from the partition's file. Once all of it was read and verified, the file is marked as verified.

    Raises:
        CheckpointError: the file can't be opened, or its header is wrong.
    """
    with job.partition.open() as file:
        verify = _verify_now(job)
        if verify:
            job.partition.check_header(file)
        source = DiskSource(job.partition, file, verify=verify, counter=job.counter)
        pipeline = ChunkPipeline(source, sink, order, num_threads=job.config.threads, window=job.window)
        with pipeline:
            yield pipeline
    if verify and pipeline.is_done and len(order) == len(job.plan.order):
        VerifiedMarks(job.config.store_dir).mark(job.partition.path, file.status)


def store_feed(job: LoadJob, lease: SpanLease, sink: ChunkSink, *, way: SpanWay) -> StoreFeed:
    """Feed a leased partition; if the daemon ends, the rest is read from the disk."""

    @contextlib.contextmanager
    def open_disk(order: Sequence[int]) -> Iterator[ChunkPipeline]:
        if order and not job.is_on_disk:
            problem = "it is not on this machine's disk, and the store's daemon ended in the middle"
            raise CheckpointUnreadable(job.partition.path, problem, MEND_STORE)
        with disk_feed(job, sink, order) as pipeline:
            yield pipeline

    return StoreFeed(lease, way, sink, plan=job.plan, window=job.window, open_disk=open_disk)


def _store_way(job: LoadJob, lease: SpanLease, device: torch.device) -> tuple[ChunkSink, SpanWay]:
    if device.type != "cuda":
        host = HostSink(job.plan)
        return host, MapWay(lease, job.plan, host, counter=job.counter)
    if job.config.h2d == "register":
        sink = CudaSink(job.plan, device, num_slots=2, counter=job.counter)  # used if the disk has to take over
        return sink, RegisterWay(lease, job.plan, sink, device=device, counter=job.counter)
    sink = CudaSink(job.plan, device, num_slots=job.window, counter=job.counter)
    return sink, CopyWay(lease, job.plan, sink, counter=job.counter)


def _sink_for(job: LoadJob, device: torch.device) -> ChunkSink:
    if device.type != "cuda":
        return HostSink(job.plan)
    return CudaSink(job.plan, device, num_slots=job.window, counter=job.counter)


def _verify_now(job: LoadJob) -> bool:
    if job.config.verify == "first":
        return not VerifiedMarks(job.config.store_dir).is_marked(job.partition.path)
    return job.config.verify == "always"


@functools.cache
def _tell_unused_once(path: str, reason: str) -> None:
    logger.info("event=store used=no reason=%r socket=%s", reason, path)
