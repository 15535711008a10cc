"""The child process of the store's benchmarks: does one job, then ends. See ``job.py``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy
import torch
from torch import nn

from benchmarks.loading.by_ipc import load_by_ipc
from benchmarks.loading.claimed_memory import ClaimedMemory
from benchmarks.loading.ipc_copy import CopierProcess
from benchmarks.loading.plain_checkpoint import module_for
from benchmarks.store.job import StoreAnswer, StoreJob
from sllm_vllm.checkpoint.reader import open_checkpoint
from sllm_vllm.config import LoaderConfig, default_store_socket
from sllm_vllm.loader.address_space import AddressSpace
from sllm_vllm.loader.load import load_module
from sllm_vllm.store.client import StoreClient
from sllm_vllm.units import MIB

RANGE_NBYTES = 16 * MIB
PAGE_NBYTES = 4096
GATE_POLL_S = 0.001


def main() -> None:
    """Command line: a job as JSON, and the file for the answer."""
    job = StoreJob.model_validate_json(sys.argv[1])
    Path(sys.argv[2]).write_text(do(job).model_dump_json())


def do(job: StoreJob) -> StoreAnswer:
    """Do a job in this process, which must not have done one before."""
    match job.action:
        case "load":
            return _load(job)
        case "memcpy":
            return _memcpy(job)
        case "download":
            return _download(job)


def _load(job: StoreJob) -> StoreAnswer:
    assert job.checkpoint is not None
    partition = open_checkpoint(job.checkpoint).partition(0)
    module = module_for(partition, torch.device(job.device))
    extra = dict(job.config)
    by_ipc = extra.get("h2d") == "ipc"  # the loader does not support this way yet
    config = LoaderConfig.from_extra_config({name: extra[name] for name in extra if not (by_ipc and name == "h2d")})
    with contextlib.ExitStack() as stack:
        copier = stack.enter_context(_copier(config, job)) if by_ipc else None
        _claim_memory(job, partition.record.data_nbytes)
        _pass_gate(job)
        start = time.perf_counter()
        if copier is None:
            report = load_module(partition, module, config)
        else:
            report = load_by_ipc(partition, module, config, device=torch.device(job.device), copier=copier)
        _synchronize(job)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    if job.device == "cpu":
        _look_at_every_page(module)
    return StoreAnswer(
        seconds=seconds,
        present_s=time.perf_counter() - start,
        wait_s=report.wait_s,
        source=report.source or "",
        hops={name: hop.model_dump() for name, hop in report.hops.items()},
    )


def _copier(config: LoaderConfig, job: StoreJob) -> CopierProcess:
    """A copier that runs before the load, as the daemon would."""
    return CopierProcess(default_store_socket(config.store_dir), torch.device(job.device))


def _look_at_every_page(module: nn.Module) -> None:
    """Read a byte of each page, as the first use of the weights would."""
    for parameter in module.parameters():
        view = parameter.data.reshape(-1).view(torch.uint8).numpy()
        view[::PAGE_NBYTES].sum()


def _memcpy(job: StoreJob) -> StoreAnswer:
    """Copy from the pool, whose pages are present, to memory that is as fresh as a load's."""
    nbytes = job.nbytes
    config = LoaderConfig.from_extra_config(job.config)
    with StoreClient(default_store_socket(config.store_dir)) as client:
        source_space, target_space = AddressSpace(nbytes), AddressSpace(nbytes)
        source_space.map_file(0, nbytes, fd=client.pool_fd, file_offset=0, shared=True)
        source_space.populate(0, nbytes)
        source, target = source_space.array(0, nbytes), target_space.array(0, nbytes)
        _claim_memory(job, nbytes)

        def copy(part: slice) -> None:
            numpy.copyto(target[part], source[part])

        step = -(-nbytes // job.num_threads)
        parts = [slice(start, min(start + step, nbytes)) for start in range(0, nbytes, step)]
        threads = [threading.Thread(target=copy, args=(part,)) for part in parts[1:]]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        copy(parts[0])
        for thread in threads:
            thread.join()
        return StoreAnswer(seconds=time.perf_counter() - start)


def _download(job: StoreJob) -> StoreAnswer:
    """Download with obstore itself, with as many ranges at once as the daemon requests."""
    import obstore
    from obstore.store import from_url

    store = from_url(job.url, client_options={"allow_http": True, "timeout": timedelta(days=1)})
    starts = iter(range(0, job.nbytes, RANGE_NBYTES))

    async def take() -> int:
        nbytes = 0
        for start in starts:
            end = min(start + RANGE_NBYTES, job.nbytes)
            if job.streams:
                result = await obstore.get_async(store, job.path, options={"range": (start, end)})
                async for piece in result.stream(min_chunk_size=256 * 1024):
                    nbytes += len(piece)
            else:
                nbytes += len(await obstore.get_range_async(store, job.path, start=start, end=end))
        return nbytes

    async def take_all() -> float:
        begun = time.perf_counter()
        counts = await asyncio.gather(*(take() for _ in range(job.num_threads)))
        assert sum(counts) == job.nbytes, (counts, job.nbytes)
        return time.perf_counter() - begun

    return StoreAnswer(seconds=asyncio.run(take_all()))


def _claim_memory(job: StoreJob, nbytes: int) -> None:
    if job.claims_memory:
        with ClaimedMemory(nbytes // 2):  # half, as it claims a multiple and these jobs touch their bytes only once
            pass


def _pass_gate(job: StoreJob) -> None:
    if job.gate is not None:
        job.gate.with_suffix(".ready").touch()
        while not job.gate.exists():
            time.sleep(GATE_POLL_S)


def _synchronize(job: StoreJob) -> None:
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the kernel unmaps everything; a regular exit would take longer
