"""A load whose bytes another process copies to the device. Assembled here, as the loader does not do it yet."""

from __future__ import annotations

import contextlib
import time

import torch
from torch import nn

from benchmarks.loading.ipc_copy import CopierProcess, IpcSink, IpcWay
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.feeds import LoadJob, store_feed
from sllm_vllm.loader.load import RunningLoad
from sllm_vllm.loader.report import HopCounter, LoadReport
from sllm_vllm.loader.span_lease import open_lease


def load_by_ipc(
    partition: RankPartition, module: nn.Module, config: LoaderConfig, *, device: torch.device, copier: CopierProcess
) -> LoadReport:
    """Fill a module on ``device`` from the store, as ``load_module`` does.

    Raises:
        StoreError: there is no daemon or no copier.
        CheckpointError: see ``start_load``.
    """
    start, counter = time.perf_counter(), HopCounter(None)
    plan = LoadPlan(partition.record, partition.manifest.chunk_nbytes)
    job = LoadJob(partition, plan, config, counter)
    lease = open_lease(partition, config, hold=False)
    with contextlib.ExitStack() as stack:
        stack.callback(lease.end_receiving)
        sink = IpcSink(plan, device, counter=counter, copier=copier)
        way = IpcWay(lease, plan, sink, counter=counter)
        feed = stack.enter_context(store_feed(job, lease, sink, way=way))
        load = RunningLoad(partition, plan, sink, feed)
        load.bind(module)
        load.finish()
    seconds = time.perf_counter() - start
    report = LoadReport(outcome="loaded", source="store", nbytes=partition.record.data_nbytes, weights_s=seconds)
    report.wait_s, report.total_s = load.wait_s, seconds
    report.hops.update(counter.hops)
    return report
