"""One load of one partition into one module: plan, source, pipeline and sink put together. Needs torch alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.checkpoint.repository import VerifiedMarks
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.limits import read_limits
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
    partition: RankPartition, module: nn.Module, config: LoaderConfig, *, report: LoadReport
) -> Iterator[RunningLoad]:
    """Begin to read a rank's partition into ``module``, whose parameters are allocated and empty.

    Fills in ``report`` at the end. A partition that was read whole and found sound is remembered as verified.

    Raises:
        LayoutMismatch: before anything is touched, if the partition is not for this module.
        CheckpointError: it can't be read.
    """
    counter, start = HopCounter(read_limits(config.store_dir)), time.perf_counter()
    targets = match_module(module, partition.record.tensors, str(partition.path))
    plan = LoadPlan(partition.record, partition.manifest.chunk_nbytes)
    with partition.open() as file:
        verify = _verify_now(partition, config)
        if verify:
            partition.check_header(file)
        sink = _sink_for(plan, targets, counter)
        source = DiskSource(partition, file, verify=verify, counter=counter)
        window = window_of(plan)
        with ChunkPipeline(source, sink, plan.order, num_threads=config.threads, window=window) as pipeline:
            load = RunningLoad(plan, targets, sink, pipeline)
            yield load
            load.finish()
    if verify:
        VerifiedMarks(config.store_dir).mark(partition.path, file.status)
    report.nbytes = partition.record.data_nbytes
    report.weights_s = load._ended - start
    report.wait_s = load.wait_s
    report.hops.update(counter.hops)


def load_module(partition: RankPartition, module: nn.Module, config: LoaderConfig) -> LoadReport:
    """Fill ``module`` with a rank's partition, with no post-processing of any kind.

    Raises:
        CheckpointError: see ``start_load``.
    """
    report = LoadReport(checkpoint=str(partition.directory), rank=partition.record.rank, outcome="loaded")
    start = time.perf_counter()
    with start_load(partition, module, config, report=report):
        pass
    report.total_s = time.perf_counter() - start
    return report


def window_of(plan: LoadPlan) -> int:
    """Chunks that may be begun ahead of the consumer; two at least, so that reading never pauses."""
    return max(2, WINDOW_NBYTES // plan.chunk_nbytes)


def _verify_now(partition: RankPartition, config: LoaderConfig) -> bool:
    if config.verify == "first":
        return not VerifiedMarks(config.store_dir).is_marked(partition.path)
    return config.verify == "always"


def _sink_for(plan: LoadPlan, targets: ModuleTargets, counter: HopCounter) -> ChunkSink:
    """The sink for the device that holds the parameters; a few of them may be elsewhere (offloaded)."""
    devices = {tensor.device for target in targets.targets for tensor in target.tensors}
    cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
    if not cuda:
        return HostSink(plan, targets.targets)
    return CudaSink(plan, targets.targets, cuda[0], num_slots=window_of(plan), counter=counter)
