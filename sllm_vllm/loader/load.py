"""One load of one partition into one module: plan, feed and sink put together. Needs torch alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.feeds import LoadJob, open_feed
from sllm_vllm.loader.limits import read_limits
from sllm_vllm.loader.module_state import ModuleTargets, match_module
from sllm_vllm.loader.report import HopCounter, LoadReport
from sllm_vllm.loader.sink import ChunkSink
from sllm_vllm.loader.store_feed import ChunkFeed


@dataclass(slots=True)
class RunningLoad:
    """A load under way: bytes are being read already. The consumer binds it to a module, then asks for tensors with
    ``require``, in any order, and ends with ``finish``."""

    partition: RankPartition
    plan: LoadPlan
    sink: ChunkSink
    feed: ChunkFeed
    targets: ModuleTargets | None = None
    wait_s: float = 0.0
    _ended: float = field(default=0.0)

    def bind(self, module: nn.Module) -> None:
        """Say which module is to be filled, its parameters allocated and empty.

        Raises:
            LayoutMismatch: the partition is not for this module, which was not touched.
        """
        self.targets = match_module(module, self.plan.partition.tensors, str(self.partition.path))
        self.sink.bind(self.targets.targets)

    def records_of(self, module: nn.Module) -> set[int]:
        """Records that a part of the bound module needs; only before any of them was required."""
        assert self.targets is not None, "bind first"
        return self.targets.records_of(module)

    def ready_position(self, records: Iterable[int]) -> int:
        """Position in the plan at which all of ``records`` are complete."""
        return max((self.plan.ready_position(record) for record in records), default=-1)

    def require(self, records: Iterable[int]) -> None:
        """Return once the parameters of ``records`` hold their weights (on a device: once ``finish`` returned, too).

        Raises:
            CheckpointError, RemoteError, OSError: what went wrong on the way.
        """
        wanted = list(records)
        start = time.perf_counter()
        self.feed.wait(self.ready_position(wanted))
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
    partition: RankPartition, config: LoaderConfig, *, device: torch.device, report: LoadReport
) -> Iterator[RunningLoad]:
    """Begin to read a rank's partition, for a module that may still have to be built on ``device``.

    Its bytes come from the store's daemon if there is one that has them, else from the disk. If it was bound to a
    module, the end of the context finishes the load and fills in ``report``.

    Raises:
        CheckpointError: it can't be read.
    """
    counter, start = HopCounter(read_limits(config.store_dir)), time.perf_counter()
    plan = LoadPlan(partition.record, partition.manifest.chunk_nbytes)
    with open_feed(LoadJob(partition, plan, config, counter), device) as opened:
        load = RunningLoad(partition, plan, opened.sink, opened.feed)
        yield load
        if load.targets is None:
            return
        load.finish()
    report.source = opened.source
    report.nbytes = partition.record.data_nbytes
    report.weights_s = load._ended - start
    report.wait_s = load.wait_s
    report.hops.update(counter.hops)


def load_module(partition: RankPartition, module: nn.Module, config: LoaderConfig) -> LoadReport:
    """Fill ``module`` with a rank's partition, with no post-processing of any kind.

    Parameters on a CUDA device are filled there; a few of them may be elsewhere (offloaded).

    Raises:
        CheckpointError: see ``start_load``.
    """
    report = LoadReport(checkpoint=str(partition.directory), rank=partition.record.rank, outcome="loaded")
    start = time.perf_counter()
    with start_load(partition, config, device=device_of(module), report=report) as load:
        load.bind(module)
    report.total_s = time.perf_counter() - start
    return report


def device_of(module: nn.Module) -> torch.device:
    """The CUDA device that holds any of a module's tensors, else the CPU."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
