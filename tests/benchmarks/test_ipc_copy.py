"""The copier that fills another process's memory: its protocol and bookkeeping on host memory, on a GPU for real."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loading.by_ipc import load_by_ipc
from benchmarks.loading.ipc_copy import CopierProcess, open_memory, share_memory
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import LoaderConfig, default_store_socket
from sllm_vllm.errors import StoreUnavailable
from tests.loader.test_module_state import Tied, assert_equal, stored
from tests.support.lease_daemon import LeaseDaemon, Script

SLOT_NBYTES = 8192
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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
    """Let an ``IpcSink`` run on host memory."""
    real_empty = torch.empty
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return real_empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


def load(store: Path, target: Tied, device: str, script: Script) -> dict[str, int]:
    """Fill ``target`` by a copier from a stored ``Tied(1)``; returns the bytes of each hop."""
    checkpoint = CheckpointRepository(store).find(stored(Tied(1), store))
    config = LoaderConfig.from_extra_config({"store_dir": store})
    where = torch.device(device)
    with LeaseDaemon(store, script, slot_nbytes=SLOT_NBYTES) as daemon:
        with CopierProcess(default_store_socket(store), where) as copier:
            assert copier.ready["registered"] == (where.type == "cuda")
            report = load_by_ipc(checkpoint.partition(0), target, config, device=where, copier=copier)
        daemon.wait_released(sorted(set(daemon.released)))
    return {name: hop.nbytes for name, hop in report.hops.items()}


def test_memory_is_the_same_for_whoever_opens_it() -> None:
    whole = torch.arange(64, dtype=torch.uint8)
    other = open_memory(share_memory(whole[16:48]))
    other.fill_(7)
    assert whole.tolist() == [*range(16), *[7] * 32, *range(48, 64)]


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("dies_after", [None, 1])
def test_copier_puts_every_byte_in_its_place(tmp_path: Path, dies_after: int | None) -> None:
    target = Tied(2)
    hops = load(tmp_path, target, "cpu", Script(dies_after=dies_after))
    assert_equal(Tied(1), target)
    assert hops["copy"] > 0


@pytest.mark.usefixtures("without_cuda")
def test_copier_that_ends_is_told(tmp_path: Path) -> None:
    stored(Tied(1), tmp_path)
    with (
        LeaseDaemon(tmp_path, Script(), slot_nbytes=SLOT_NBYTES),
        CopierProcess(default_store_socket(tmp_path), torch.device("cpu")) as copier,
    ):
        copier._process.kill()
        with pytest.raises(StoreUnavailable, match="copies to the device ended"):
            copier.bind([torch.zeros(8, dtype=torch.uint8)])


def test_copier_without_a_daemon_is_told(tmp_path: Path) -> None:
    (tmp_path / ".store").mkdir()
    with pytest.raises(StoreUnavailable, match="copies to the device ended"):
        CopierProcess(default_store_socket(tmp_path), torch.device("cpu"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dies_after", [None, 1])
def test_on_a_gpu_the_copier_puts_every_byte_in_its_place(tmp_path: Path, dies_after: int | None) -> None:
    target = Tied(2).cuda()
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    load(tmp_path, target, "cuda:0", Script(dies_after=dies_after))
    assert [parameter.data_ptr() for parameter in target.parameters()] == addresses
    assert_equal(Tied(1), target.cpu())
