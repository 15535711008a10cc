"""Loads out of the store's pool: bit-identical whatever the daemon does, private, and nothing left behind."""

from __future__ import annotations

import gc
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.loader.load import start_load
from sllm_vllm.loader.report import LoadReport
from tests.loader.store_bench import (
    CHUNK_NBYTES,
    NUM_SPANS,
    Bench,
    Block,
    keep_even,
    keep_none,
    nothing_left_behind,
    spans_of,
)
from tests.loader.test_module_state import assert_equal
from tests.support.lease_daemon import Script, open_fds
from tests.support.waiting import DEADLINE_S


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every test ends with as many descriptors and threads as before."""
    with nothing_left_behind():
        yield


REVERSED = tuple(reversed(range(NUM_SPANS)))


@pytest.mark.parametrize(
    "script",
    [
        Script(),
        Script(batch=100),
        Script(keep=keep_none),
        Script(keep=keep_none, transit=1),
        Script(keep=keep_even, transit=1),
        Script(order=REVERSED),
        Script(order=REVERSED, keep=keep_none, transit=1),
        Script(order=REVERSED, keep=keep_even, batch=4),
    ],
    ids=["kept", "at-once", "copied", "one-in-transit", "mixed", "reversed", "reversed-copied", "reversed-mixed"],
)
def test_weights_are_bit_identical_however_spans_are_given(bench: Bench, script: Script) -> None:
    with bench.daemon(script) as daemon:
        report = bench.load_and_compare()
        assert report.source == "store"
        assert report.hops.keys() <= {"map", "copy_pool"}
        assert sum(hop.nbytes for hop in report.hops.values()) == bench.partition.record.data_nbytes
        gc.collect()
        daemon.wait_released(range(NUM_SPANS))
        daemon.wait_idle()


@pytest.mark.parametrize("chunks_per_span", [1, 2, 5, 64])
def test_a_span_may_have_any_number_of_chunks(bench: Bench, chunks_per_span: int) -> None:
    for script in (Script(), Script(keep=keep_none), Script(keep=keep_even)):
        with bench.daemon(script, chunks_per_span=chunks_per_span):
            assert bench.load_and_compare().source == "store"


def test_the_daemon_is_asked_by_name_inside_the_store_and_by_path_outside(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere" / "model"
    with bench.daemon() as daemon:
        bench.load_and_compare()
        shutil.copytree(bench.partition.directory, outside)
        bench.partition = RankPartition(outside, bench.partition.manifest, bench.partition.record)
        bench.load_and_compare()
        assert [lease.checkpoint for lease in daemon.leases] == [daemon.leases[0].checkpoint, str(outside)]
        assert (tmp_path / daemon.leases[0].checkpoint).is_dir()
        assert all(lease.hold for lease in daemon.leases)


def test_without_store_the_daemon_is_not_asked(bench: Bench) -> None:
    with bench.daemon() as daemon:
        assert bench.load(Block(2), store=False).source == "disk"
        assert daemon.leases == []


def test_a_write_to_a_parameter_stays_private(bench: Bench) -> None:
    with bench.daemon() as daemon:
        first, second = Block(2), Block(3)
        bench.load(first)
        bench.load(second)
        before = [daemon.slot_bytes(span) for span in range(NUM_SPANS)]
        for tensor in first.parameters():
            tensor.data.fill_(7.0)
        assert [daemon.slot_bytes(span) for span in range(NUM_SPANS)] == before
        assert_equal(Block(1), second)
        del first, second, tensor


def test_kept_weights_are_the_pools_own_pages(bench: Bench) -> None:
    with bench.daemon():
        module = Block(2)
        bench.load(module)
        assert_equal(Block(1), module)
        smaps = Path("/proc/self/smaps").read_text()
        entries = re.findall(r"rw-p [^\n]*sllm-pool.*?Anonymous:\s+(\d+) kB", smaps, re.DOTALL)
        assert entries
        assert set(entries) == {"0"}
        del module


def test_a_span_is_released_when_its_tensors_die_and_not_before(bench: Bench) -> None:
    names = {record.name for record in bench.partition.record.tensors}
    rebound = names - {"turned", "odd"}  # the one is not contiguous, the other not aligned: they are copied

    def spans_without(live: set[str]) -> list[int]:
        held = set[int]().union(*(spans_of(bench, name) for name in live))
        return sorted(set(range(len(bench.partition.record.chunks))) - held)

    with bench.daemon(chunks_per_span=1) as daemon:
        module = Block(2)
        bench.load(module)
        daemon.wait_released(spans_without(rebound))
        del module.layers[1]
        daemon.wait_released(spans_without(rebound - {"layers.1.weight", "layers.1.bias"}))
        kept = module.embed.weight
        del module
        gc.collect()
        daemon.wait_released(spans_without({"embed.weight"}))
        assert torch.equal(kept, Block(1).embed.weight)
        assert daemon.num_open == 1
        del kept
        daemon.wait_released(spans_without(set()))
        daemon.wait_idle()


def test_a_forked_child_releases_nothing(bench: Bench) -> None:
    with bench.daemon() as daemon:
        module = Block(2)
        bench.load(module)
        child = os.fork()
        if child == 0:
            del module
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        assert_equal(Block(1), module)
        del module
        gc.collect()
        daemon.wait_idle()
        daemon.wait_released(range(NUM_SPANS))


def test_spans_that_can_not_be_mapped_are_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_vllm.loader.partition_memory.MAPPED_SPANS_MAX", 2)
    with bench.daemon():
        assert bench.load_and_compare().hops.keys() == {"map", "copy_pool"}


def test_a_load_that_is_given_up_before_anything_came_ends(bench: Bench) -> None:
    gate = threading.Event()
    with bench.daemon(Script(gates={0: gate})) as daemon:
        report = LoadReport(outcome="loaded")
        device = torch.device("cpu")
        with (
            pytest.raises(KeyError),
            start_load(bench.partition, bench.config(), device=device, report=report),
        ):
            raise KeyError
        gate.set()
        gc.collect()
        daemon.wait_idle()


def test_parameters_of_a_broken_load_keep_their_spans_until_they_die(bench: Bench) -> None:
    gate = threading.Event()
    names = [record.name for record in bench.partition.record.tensors]
    with bench.daemon(Script(order=(4, 0, 1, 2, 3), gates={3: gate})) as daemon:
        module, report = Block(2), LoadReport(outcome="loaded")

        def break_off(module: nn.Module) -> None:
            with start_load(bench.partition, bench.config(), device=torch.device("cpu"), report=report) as load:
                load.bind(module)
                load.require([names.index("embed.weight")])
                raise KeyError

        with pytest.raises(KeyError):
            break_off(module)
        gate.set()
        daemon.wait_released(sorted(set(range(NUM_SPANS)) - spans_of(bench, "embed.weight", 4)))
        assert daemon.num_open == 1
        assert torch.equal(module.embed.weight, Block(1).embed.weight)
        del module
        gc.collect()
        daemon.wait_idle()


def test_tensors_are_bound_as_their_spans_come(bench: Bench) -> None:
    gate = threading.Event()
    order = (4, 0, 1, 2, 3)
    with bench.daemon(Script(order=order, gates={3: gate}, keep=keep_even)) as daemon:
        module, report = Block(2), LoadReport(outcome="loaded")
        device = torch.device("cpu")
        with start_load(bench.partition, bench.config(), device=device, report=report) as load:
            load.bind(module)
            early = [i for i, r in enumerate(bench.partition.record.tensors) if r.end <= 3 * 4 * CHUNK_NBYTES]
            load.require(early)
            assert early
            assert not gate.is_set()
            gate.set()
        assert_equal(Block(1), module)
        del module, load
        gc.collect()
        daemon.wait_idle()


def num_maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_many_loads_leave_no_mapping_and_no_descriptor_behind(bench: Bench) -> None:
    with bench.daemon(Script(keep=keep_even, batch=100)) as daemon:
        bench.load_and_compare()
        daemon.wait_idle()
        fds, maps = len(open_fds()), num_maps()
        for _ in range(200):
            bench.load(Block(2))
        gc.collect()
        daemon.wait_idle()
        assert len(open_fds()) <= fds + 2  # a connection whose last thread is still ending
        assert num_maps() <= maps + 20


def test_two_loads_at_once_share_the_pool(bench: Bench) -> None:
    with bench.daemon(Script(keep=keep_even, transit=1)) as daemon:
        modules: Sequence[nn.Module] = [Block(2), Block(3)]
        loads = [threading.Thread(target=bench.load, args=(module,)) for module in modules]
        for load in loads:
            load.start()
        for load in loads:
            load.join(DEADLINE_S)
        for module in modules:
            assert_equal(Block(1), module)
        del modules, module
        gc.collect()
        daemon.wait_released([*range(NUM_SPANS), *range(NUM_SPANS)])


def test_tensors_that_die_on_many_threads_release_each_span_once(bench: Bench) -> None:
    for _ in range(20):
        with bench.daemon(chunks_per_span=1) as daemon:
            module = Block(2)
            bench.load(module)
            doomed = [tensor.data for tensor in module.parameters()]
            del module
            threads = [threading.Thread(target=doomed.pop) for _ in range(len(doomed))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE_S)
            daemon.wait_released(range(len(bench.partition.record.chunks)))
            daemon.wait_idle()
