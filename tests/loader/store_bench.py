"""A stored module, daemons that serve it and loads of it, for the tests of loads out of the store."""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.load import load_module
from sllm_vllm.loader.report import LoadReport
from tests.loader.test_module_state import assert_equal, stored
from tests.support.lease_daemon import LeaseDaemon, Script, open_fds
from tests.support.waiting import DEADLINE_S

CHUNK_NBYTES = 4096
NUM_SPANS = 5  # of 4 chunks each, the last one shorter


class Block(nn.Module):
    """Tensors of one chunk and of several, small ones, an unaligned one, a transposed one, a tied one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.LayerNorm(64)
        self.odd = nn.Parameter(torch.empty(5))
        self.turned = nn.Parameter(torch.empty(32, 48).t())
        for tensor in self.parameters():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator))


class Bench:
    """A stored ``Block(1)``, daemons that serve it, and loads of it."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.partition = partition_of(store, CHUNK_NBYTES)

    def daemon(self, script: Script | None = None, *, chunks_per_span: int = 4) -> LeaseDaemon:
        return LeaseDaemon(self.store, script or Script(), slot_nbytes=chunks_per_span * CHUNK_NBYTES)

    def config(self, **extra: object) -> LoaderConfig:
        return LoaderConfig.from_extra_config({"store_dir": self.store, "verify": "always", **extra})

    def load(self, module: nn.Module, **extra: object) -> LoadReport:
        return load_module(self.partition, module, self.config(**extra))

    def load_and_compare(self) -> LoadReport:
        module = Block(2)
        report = self.load(module)
        assert_equal(Block(1), module)
        return report

    def remove_partition(self) -> None:
        shutil.rmtree(self.partition.path.parent)


def partition_of(store: Path, chunk_nbytes: int) -> RankPartition:
    return CheckpointRepository(store).find(stored(Block(1), store, chunk_nbytes)).partition(0)


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Check that what happens inside leaves as many descriptors and threads as before."""
    gc.collect()
    fds, threads = open_fds(), threading.active_count()
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "sllm-lease":  # its lease has just ended
            thread.join(DEADLINE_S)
    assert len(open_fds() - fds) == 0
    assert threading.active_count() == threads


def keep_none(span: int) -> bool:
    return False


def keep_even(span: int) -> bool:
    return span % 2 == 0


def spans_of(bench: Bench, name: str, chunks_per_span: int = 1) -> set[int]:
    (record,) = [record for record in bench.partition.record.tensors if record.name == name]
    nbytes = chunks_per_span * CHUNK_NBYTES
    return set(range(record.offset // nbytes, (record.end - 1) // nbytes + 1))
