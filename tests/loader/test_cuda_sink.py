"""`CudaSink` puts every byte in its place: on a GPU for real, elsewhere its bookkeeping on host memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader import feeds
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.feeds import LoadJob
from sllm_vllm.loader.load import load_module, start_load
from sllm_vllm.loader.report import HopCounter, LoadReport
from sllm_vllm.loader.sink import ChunkSink
from sllm_vllm.loader.span_lease import SpanLease
from sllm_vllm.loader.span_ways import CopyWay, RegisterWay, SpanWay
from tests.loader.test_module_state import Tied, assert_equal, stored
from tests.support.lease_daemon import LeaseDaemon, Script

FillFromStore = Callable[[nn.Module, Script, str], dict[str, int]]


class HostEvent:
    """An event of a device whose work is done at once."""

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class HostStream(HostEvent):
    """Its stream."""

    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a ``CudaSink`` run on host memory: streams do nothing, and memory is not page-locked."""
    real_empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", HostStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return real_empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)

    def sink_for(job: LoadJob, device: torch.device) -> CudaSink:
        return CudaSink(job.plan, device, num_slots=2, counter=job.counter)

    monkeypatch.setattr(feeds, "_sink_for", sink_for)


def fill(target: nn.Module, store: Path, chunk_nbytes: int) -> dict[str, int]:
    """Fill ``target`` from a stored ``Tied(1)``; returns the bytes of each hop."""
    checkpoint = CheckpointRepository(store).find(stored(Tied(1), store, chunk_nbytes))
    config = LoaderConfig.from_extra_config({"store_dir": store, "verify": "always"})
    report = load_module(checkpoint.partition(0), target, config)
    return {name: hop.nbytes for name, hop in report.hops.items()}


@pytest.mark.parametrize("chunk_nbytes", [4096, 1 << 20])
@pytest.mark.usefixtures("without_cuda")
def test_bytes_arrive_in_place_and_parameters_keep_their_memory(tmp_path: Path, chunk_nbytes: int) -> None:
    target = Tied(2)
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    hops = fill(target, tmp_path, chunk_nbytes)
    assert_equal(Tied(1), target)
    assert [parameter.data_ptr() for parameter in target.parameters()] == addresses
    assert hops["copy"] == hops["verify"]


@pytest.fixture
def sink(tmp_path: Path, without_cuda: None) -> CudaSink:
    checkpoint = CheckpointRepository(tmp_path).find(stored(Tied(1), tmp_path))
    record = checkpoint.manifest.partitions[0]
    return CudaSink(LoadPlan(record, 4096), torch.device("cpu"), num_slots=1, counter=HopCounter())


def test_buffers_are_page_aligned_and_as_large_as_a_chunk(sink: CudaSink) -> None:
    buffer = sink.buffer(0)
    assert torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 4096 == 0
    assert len(buffer) == 4096


def test_a_reader_that_waits_for_a_buffer_is_woken_by_stop(sink: CudaSink) -> None:
    sink.buffer(0)
    woken = threading.Event()

    def wait() -> None:
        with pytest.raises(InterruptedError):
            sink.buffer(1)
        woken.set()

    reader = threading.Thread(target=wait)
    reader.start()
    sink.stop()
    reader.join(30)
    assert woken.is_set()


def test_a_chunk_that_came_before_the_module_waits_for_it_and_is_dropped_by_stop(sink: CudaSink) -> None:
    buffer, dropped = sink.buffer(0), threading.Event()

    def deliver() -> None:
        with pytest.raises(InterruptedError):
            sink.deliver(0, buffer, 4096)
        dropped.set()

    reader = threading.Thread(target=deliver)
    reader.start()
    assert not dropped.is_set()
    sink.stop()
    reader.join(30)
    assert dropped.is_set()


class HostDriver:
    """The driver's calls to page-lock memory; refuses a read-only registration unless told otherwise."""

    def __init__(self, refused_flags: tuple[int, ...]) -> None:
        self.refused_flags = refused_flags
        self.registered: list[int] = []
        self.num_registered = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if flags in self.refused_flags:
            return 801
        self.registered.append(address)
        self.num_registered += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


@pytest.fixture
def from_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_cuda: None) -> FillFromStore:
    """Fill a module out of a scripted daemon's pool, with CUDA's ways on host memory."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def fill_from_store(target: nn.Module, script: Script, h2d: str) -> dict[str, int]:
        checkpoint = CheckpointRepository(tmp_path).find(stored(Tied(1), tmp_path))
        config = LoaderConfig.from_extra_config({"store_dir": tmp_path, "verify": "always", "h2d": h2d})
        device = torch.device("cpu")

        def way_for(job: LoadJob, lease: SpanLease, device: torch.device) -> tuple[ChunkSink, SpanWay]:
            sink = CudaSink(job.plan, device, num_slots=2, counter=job.counter)
            if job.config.h2d == "register":
                return sink, RegisterWay(lease, job.plan, sink, device=device, counter=job.counter)
            return sink, CopyWay(lease, job.plan, sink, counter=job.counter)

        monkeypatch.setattr(feeds, "_store_way", way_for)
        report = LoadReport(outcome="loaded")
        with (
            LeaseDaemon(tmp_path, script, slot_nbytes=8192) as daemon,
            start_load(checkpoint.partition(0), config, device=device, report=report) as load,
        ):
            load.bind(target)
            load.finish()
            if script.dies_after is None:
                daemon.wait_released(range(-(-len(checkpoint.partition(0).record.chunks) // 2)))
        assert report.source == "store"
        return {name: hop.nbytes for name, hop in report.hops.items()}

    return fill_from_store


SCRIPTS = [
    Script(keep=lambda span: False),
    Script(keep=lambda span: False, order=(1, 0), transit=1),
    *(Script(keep=lambda span: False, dies_after=number) for number in range(3)),
]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=["in-order", "reversed", "dies-0", "dies-1", "dies-2"])


@each_script
def test_ring_copies_from_the_pool_in_place(from_store: FillFromStore, script: Script) -> None:
    target = Tied(2)
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    hops = from_store(target, script, "ring")
    assert_equal(Tied(1), target)
    assert [parameter.data_ptr() for parameter in target.parameters()] == addresses
    if script.dies_after is None:
        assert hops["copy"] == hops["copy_pool"]


@each_script
@pytest.mark.parametrize("refused_flags", [(), (8,), (8, 0)])
def test_register_copies_from_the_slots_themselves(
    from_store: FillFromStore, monkeypatch: pytest.MonkeyPatch, script: Script, refused_flags: tuple[int, ...]
) -> None:
    driver, target = HostDriver(refused_flags), Tied(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    hops = from_store(target, script, "register")
    assert_equal(Tied(1), target)
    assert driver.registered == []
    assert "copy_pool" not in hops
    if script.dies_after is None:
        assert (driver.num_registered == 0) == (0 in refused_flags)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chunk_nbytes", [4096, 1 << 20])
def test_on_a_gpu_bytes_arrive_in_place(tmp_path: Path, chunk_nbytes: int) -> None:
    target = Tied(2).cuda()
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    fill(target, tmp_path, chunk_nbytes)
    assert [parameter.data_ptr() for parameter in target.parameters()] == addresses
    assert_equal(Tied(1), target.cpu())


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_offloaded_parameters_are_filled_too(tmp_path: Path) -> None:
    target = Tied(2).cuda()
    target.body.cpu()
    fill(target, tmp_path, 4096)
    assert_equal(Tied(1), target.cpu())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("h2d", ["ring", "register"])
@pytest.mark.parametrize("dies_after", [None, 1])
def test_on_a_gpu_the_pool_arrives_in_place(tmp_path: Path, h2d: str, dies_after: int | None) -> None:
    target = Tied(2).cuda()
    checkpoint = CheckpointRepository(tmp_path).find(stored(Tied(1), tmp_path))
    config = LoaderConfig.from_extra_config({"store_dir": tmp_path, "verify": "always", "h2d": h2d})
    with LeaseDaemon(tmp_path, Script(dies_after=dies_after), slot_nbytes=8192):
        report = load_module(checkpoint.partition(0), target, config)
    assert report.source == "store"
    assert_equal(Tied(1), target.cpu())
