"""One load of one partition into one module: plan, source, pipeline and sink put together. Needs torch alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.core.manifest import Partition
from sllm_vllm.checkpoint.reader import Checkpoint, read_header
from sllm_vllm.checkpoint.repository import VerifiedMarks
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.core.plan import LoadPlan, plan_load
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.module_state import ModuleTargets, match_module
from sllm_vllm.loader.pipeline import ChunkPipeline
from sllm_vllm.loader.report import HopCounter, LoadReport
from sllm_vllm.loader.sink import ChunkSink, HostSink
from sllm_vllm.loader.source import DiskSource
from sllm_vllm.units import MIB

WINDOW_NBYTES = 64 * MIB
"""How far readers may run ahead of the consumer. More hides longer stalls, but costs as much memory."""


@dataclass(slots=True)
class RunningLoad:
    """A load under way. The consumer asks for tensors with ``require``, in any order, and ends with ``finish``."""

    plan: LoadPlan
    targets: ModuleTargets
    sink: ChunkSink
    pipeline: ChunkPipeline
    wait_s: float = 0.0
    _ended: float = field(default=0.0)

    def ready_position(self, records: Iterable[int]) -> int:
        """Position in the plan at which all of ``records`` are complete."""
        return max((self.plan.ready_position(record) for record in records), default=-1)

    def require(self, records: Iterable[int]) -> None:
        """Return once the parameters of ``records`` hold their weights (on a device: once ``finish`` returned, too).

        Raises:
            CheckpointCorrupt, OSError: what a reader met.
        """
        wanted = list(records)
        start = time.perf_counter()
        self.pipeline.wait(self.ready_position(wanted))
        self.wait_s += time.perf_counter() - start
        for record in wanted:
            self.sink.attach(record)

    def finish(self) -> None:
        """Require everything that is left."""
        self.require(range(len(self.plan.partition.tensors)))
        self.sink.finish()
        self._ended = self._ended or time.perf_counter()


@contextlib.contextmanager
def start_load(
    checkpoint: Checkpoint, rank: int, module: nn.Module, config: LoaderConfig, report: LoadReport
) -> Iterator[RunningLoad]:
    """Begin to read a rank's partition into ``module``, whose parameters are allocated and empty.

    Fills in ``report`` at the end. A partition that was read whole and found sound is remembered as verified.

    Raises:
        LayoutMismatch: before anything is touched, if the partition is not for this module.
        CheckpointError: it can't be read.
    """
    counter, start = HopCounter(), time.perf_counter()
    manifest, partition = checkpoint.manifest, checkpoint.manifest.partitions[rank]
    path = checkpoint.path / partition.path
    targets = match_module(module, partition.tensors, str(path))
    plan = plan_load(manifest, rank)
    with checkpoint.open_partition(rank) as file:
        verify = _verify_now(file, partition, path, config)
        sink = _sink_for(module, plan, targets, counter)
        source = DiskSource(file, manifest, partition, verify=verify, counter=counter)
        window = max(2, WINDOW_NBYTES // manifest.chunk_nbytes)
        pipeline = ChunkPipeline(source, sink, plan.order, num_threads=config.threads, window=window)
        with pipeline:
            load = RunningLoad(plan, targets, sink, pipeline)
            yield load
            load.finish()
    if verify:
        VerifiedMarks(config.store_dir).mark(path)
    report.nbytes = partition.data_nbytes
    report.weights_s = load._ended - start
    report.wait_s = load.wait_s
    report.hops.update(counter.hops)


def load_module(checkpoint: Checkpoint, rank: int, module: nn.Module, config: LoaderConfig) -> LoadReport:
    """Fill ``module`` with a rank's partition, with no post-processing of any kind.

    Raises:
        CheckpointError: see ``start_load``.
    """
    report = LoadReport(checkpoint=str(checkpoint.path), rank=rank, outcome="loaded")
    start = time.perf_counter()
    with start_load(checkpoint, rank, module, config, report):
        pass
    report.total_s = time.perf_counter() - start
    return report


def _verify_now(file: ChunkFile, partition: Partition, path: Path, config: LoaderConfig) -> bool:
    verify = config.verify == "always" or (
        config.verify == "first" and not VerifiedMarks(config.store_dir).is_marked(path)
    )
    if verify:
        read_header(file, partition)
    return verify


def _sink_for(module: nn.Module, plan: LoadPlan, targets: ModuleTargets, counter: HopCounter) -> ChunkSink:
    """The sink for the device that holds the parameters; a few of them may be elsewhere (offloaded)."""
    devices = {tensor.device for target in targets.targets for tensor in target.tensors}
    cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
    if not cuda:
        return HostSink(plan, targets.targets)
    num_slots = max(2, WINDOW_NBYTES // plan.chunk_nbytes)
    return CudaSink(plan, targets.targets, torch.device(cuda[0]), num_slots=num_slots, counter=counter)
