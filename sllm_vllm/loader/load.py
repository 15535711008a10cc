"""Loads one partition into one module; puts plan, feed and sink together. Needs torch alone."""

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
    """A load whose bytes are being read already.

    The consumer calls ``bind`` with the module to fill, then ``require`` for tensors in any order, then ``finish``.
    """

    partition: RankPartition
    plan: LoadPlan
    sink: ChunkSink
    feed: ChunkFeed
    targets: ModuleTargets | None = None
    wait_s: float = 0.0
    _ended: float = field(default=0.0)

    def bind(self, module: nn.Module) -> None:
        """Set the module to fill. Its parameters must be allocated; their content does not matter.

        Raises:
            LayoutMismatch: the partition does not match this module, which is unchanged.
        """
        self.targets = match_module(module, self.plan.partition.tensors, str(self.partition.path))
        self.sink.bind(self.targets.targets)

    def records_of(self, module: nn.Module) -> set[int]:
        """Records that a part of the bound module needs. Call it only before any of them was required."""
        assert self.targets is not None, "bind first"
        return self.targets.records_of(module)

    def ready_position(self, records: Iterable[int]) -> int:
        """Position in the plan at which all of ``records`` are complete."""
        return max((self.plan.ready_position(record) for record in records), default=-1)

    def require(self, records: Iterable[int]) -> None:
        """Return once the parameters of ``records`` hold their weights. On a device they do so only after ``finish``.

        Raises:
            CheckpointError, RemoteError, OSError: a chunk could not be delivered.
        """
        wanted = list(records)
        start = time.perf_counter()
        self.feed.wait(self.ready_position(wanted))
        self.wait_s += time.perf_counter() - start
        for record in wanted:
            self.sink.attach(record)

    def finish(self) -> None:
        """Require all remaining records, and return once every parameter can be used."""
        self.require(range(len(self.plan.partition.tensors)))
        self.sink.finish()
        self._ended = self._ended or time.perf_counter()


@contextlib.contextmanager
def start_load(
    partition: RankPartition, config: LoaderConfig, *, device: torch.device, report: LoadReport
) -> Iterator[RunningLoad]:
    """Begin to read a rank's partition; the module that it fills, on ``device``, may be built meanwhile.

    The bytes come from the store's daemon if it has them, else from the disk. If the load was bound to a module, the
    end of the context finishes it and fills in ``report``.

    Raises:
        CheckpointError: the partition can't be read.
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
    """Fill ``module`` with a rank's partition, without any post-processing.

    Parameters may be on a CUDA device; some of those may be offloaded to the CPU.

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
    """The CUDA device of a module's tensors if any of them is on one, else the CPU."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
