"""Loads from the real daemon while it is killed, again and again: from disk then, never wrong, never broken."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path

import torch
from torch import nn

from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.load import load_module
from sllm_vllm.units import MIB
from tests.loader.test_module_state import assert_equal, stored
from tests.support.store_daemon import store_daemon
from tests.support.waiting import wait_until

NUM_ENGINES = 3
NUM_KILLS = 4


class Wide(nn.Module):
    """24 MiB in 12 weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(512, 1024, bias=False) for _ in range(12))
        for parameter in self.parameters():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator))


def wait_for_load(sources: list[str | None], source: str) -> None:
    """Wait until one more load has taken its bytes from there."""
    num_before = len(sources)
    wait_until(lambda: source in sources[num_before:], f"a load from the {source}")


def test_engines_survive_a_daemon_that_is_killed_under_them(tmp_path: Path) -> None:
    store = tmp_path / "store"
    partition = CheckpointRepository(store).find(stored(Wide(1), store, MIB)).partition(0)
    configs = [LoaderConfig(store_dir=store, pool="map"), LoaderConfig(store_dir=store, pool="copy")]
    expected, stopped = Wide(1), threading.Event()
    sources: list[str | None] = []

    def serve(engine: int) -> None:
        """Start again and again, as an engine does; what was loaded last lives on while the next one loads."""
        alive: list[nn.Module] = []
        while not stopped.is_set():
            module = Wide(2)
            sources.append(load_module(partition, module, configs[engine % 2]).source)
            alive = [*alive[-1:], module]
            for loaded in alive:
                assert_equal(expected, loaded)

    with concurrent.futures.ThreadPoolExecutor(NUM_ENGINES) as pool:
        engines = [pool.submit(serve, engine) for engine in range(NUM_ENGINES)]
        try:
            for _ in range(NUM_KILLS):
                with store_daemon(store, memory_bytes=16 * MIB):
                    wait_for_load(sources, "store")
                wait_for_load(sources, "disk")
        finally:
            stopped.set()
    assert [engine.exception() for engine in engines] == [None] * NUM_ENGINES
