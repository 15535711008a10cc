"""Reads a partition as named host tensors, in file order, for reloading, exporting and comparing. Needs torch alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import LoaderConfig
from sllm_vllm.errors import CheckpointInvalid
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.feeds import LoadJob, lease_or_none, store_feed
from sllm_vllm.loader.module_state import ModuleTarget
from sllm_vllm.loader.pipeline import ChunkPipeline, DiskSource
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import HostSink
from sllm_vllm.loader.span_ways import CopyWay
from sllm_vllm.loader.store_feed import ChunkFeed


def read_tensors(partition: RankPartition, config: LoaderConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every stored tensor under each of its names. Memory stays bounded if the caller drops tensors it has used.

    The bytes come from the disk, so that reading them once evicts nothing from the store's memory. They come from the
    store only if the file is not on this machine's disk.

    Raises:
        CheckpointError: the partition can't be read, or differs from its checksums.
        RemoteError: the store can't fetch it.
    """
    plan = LoadPlan(partition.record, partition.manifest.chunk_nbytes)
    path = str(partition.path)
    targets = [ModuleTarget([_empty(r.dtype, r.shape, path)], rebindable=True) for r in partition.record.tensors]
    sink = HostSink(plan)
    sink.bind(targets)
    with _open_feed(LoadJob(partition, plan, config, HopCounter()), sink) as feed:
        for index, record in enumerate(partition.record.tensors):
            tensor = targets[index].tensors[0]
            feed.wait(plan.ready_position(index))
            sink.attach(index)
            for name in (record.name, *record.aliases):
                yield name, tensor
            del tensor


@contextlib.contextmanager
def _open_feed(job: LoadJob, sink: HostSink) -> Iterator[ChunkFeed]:
    lease = None if job.is_on_disk else lease_or_none(job, hold=False)
    if lease is not None:
        with store_feed(job, lease, sink, way=CopyWay(lease, job.plan, sink, counter=job.counter)) as feed:
            yield feed
        return
    with job.partition.open() as file:
        source = DiskSource(job.partition, file, verify=job.config.verify != "never", counter=job.counter)
        order, threads = job.plan.order, job.config.threads
        with ChunkPipeline(source, sink, order, num_threads=threads, window=job.window) as pipeline:
            yield pipeline


def _empty(dtype: str, shape: list[int], path: str) -> torch.Tensor:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointInvalid(path, f"this torch has no dtype {dtype!r}", "install a newer torch")
    return torch.empty(shape, dtype=found)
