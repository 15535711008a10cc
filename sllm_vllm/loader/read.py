"""A partition as a stream of named host tensors, in file order: for reloading and exporting. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import LoaderConfig
from sllm_vllm.errors import CheckpointInvalid
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.load import window_of
from sllm_vllm.loader.module_state import ModuleTarget
from sllm_vllm.loader.pipeline import ChunkPipeline
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import HostSink
from sllm_vllm.loader.source import DiskSource


def read_tensors(partition: RankPartition, config: LoaderConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stored tensor under each of its names. Memory is bounded if the caller drops what it took.

    Raises:
        CheckpointError: it can't be read, or differs from its checksums.
    """
    plan = LoadPlan(partition.record, partition.manifest.chunk_nbytes)
    path = str(partition.path)
    targets = [ModuleTarget([_empty(r.dtype, r.shape, path)], rebindable=True) for r in partition.record.tensors]
    sink = HostSink(plan)
    sink.bind(targets)
    with partition.open() as file:
        source = DiskSource(partition, file, verify=config.verify != "never", counter=HopCounter())
        window = window_of(plan)
        with ChunkPipeline(source, sink, plan.order, num_threads=config.threads, window=window) as pipeline:
            for index, record in enumerate(partition.record.tensors):
                tensor = targets[index].tensors[0]
                pipeline.wait(plan.ready_position(index))
                sink.attach(index)
                for name in (record.name, *record.aliases):
                    yield name, tensor
                del tensor


def _empty(dtype: str, shape: list[int], path: str) -> torch.Tensor:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointInvalid(path, f"this torch has no dtype {dtype!r}", "install a newer torch")
    return torch.empty(shape, dtype=found)
