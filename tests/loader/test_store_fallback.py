"""Loads where the store does not help, or only half: the disk does the rest, or an error says what to do."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sllm_vllm.errors import CheckpointCorrupt, CheckpointMissing, CheckpointUnreadable, RemoteUnreachable, SllmError
from sllm_vllm.loader.module_state import named_state
from sllm_vllm.loader.read import read_tensors
from tests.loader.store_bench import (
    NUM_SPANS,
    Bench,
    Block,
    keep_even,
    keep_none,
    nothing_left_behind,
)
from tests.loader.test_module_state import assert_equal
from tests.support.lease_daemon import Script


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every test ends with as many descriptors and threads as before."""
    with nothing_left_behind():
        yield


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Messages logged at a level."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.mark.parametrize("order", [(0, 0, 1, 2, 3), (0, 1, 2, 3)])
def test_a_daemon_that_gives_nonsense_is_replaced_by_the_disk(bench: Bench, order: tuple[int, ...]) -> None:
    with bench.daemon(Script(order=order, dies_after=len(order))):
        assert bench.load_and_compare().source == "store"
        gc.collect()


def test_a_lease_that_does_not_fit_the_partition_is_not_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, records: Callable[[int], list[str]]
) -> None:
    wrong = [range(first, first + 1) for first in range(3)]
    with bench.daemon() as daemon:
        monkeypatch.setattr(daemon, "chunks_of_spans", lambda partition: wrong)
        assert bench.load_and_compare().source == "disk"
    (line,) = records(logging.WARNING)
    assert "does not fit the partition" in line


def test_a_daemon_that_dies_after_the_load_is_not_missed(bench: Bench) -> None:
    with bench.daemon() as daemon:
        module = Block(2)
        bench.load(module)
        daemon.die()
        daemon.pool.close()
        assert_equal(Block(1), module)
        del module
        gc.collect()


@pytest.mark.parametrize("num_given", range(NUM_SPANS + 1))
@pytest.mark.parametrize("keep", [keep_even, keep_none, Script().keep])
def test_a_daemon_that_dies_in_the_middle_is_replaced_by_the_disk(
    bench: Bench, num_given: int, keep: Callable[[int], bool]
) -> None:
    with bench.daemon(Script(keep=keep, dies_after=num_given)):
        report = bench.load_and_compare()
        assert report.source == "store"
        assert sum(hop.nbytes for name, hop in report.hops.items() if name != "verify") == report.nbytes
        gc.collect()


def test_the_rest_from_the_disk_is_verified(bench: Bench) -> None:
    with bench.partition.path.open("r+b") as file:
        file.seek(bench.partition.chunk_range(13)[0])
        file.write(b"\0\0\0\0")
    module = Block(2)
    with bench.daemon(Script(dies_after=2)), pytest.raises(CheckpointCorrupt, match="chunk 13 differs"):
        bench.load(module)
    del module


@pytest.mark.parametrize("num_given", [0, 3])
def test_a_daemon_that_dies_where_there_is_no_disk_is_an_error_with_a_mend(bench: Bench, num_given: int) -> None:
    with bench.daemon(Script(dies_after=num_given)) as daemon:
        for span in range(num_given):
            daemon.fill(bench.partition, span)
        bench.remove_partition()
        module = Block(2)
        with pytest.raises(CheckpointUnreadable, match=r"daemon ended in the middle; start `sllm-vllm store serve`"):
            bench.load(module)
        del module


def test_without_local_files_the_store_is_enough(bench: Bench) -> None:
    with bench.daemon() as daemon:
        for span in range(NUM_SPANS):
            daemon.fill(bench.partition, span)
        bench.remove_partition()
        assert bench.load_and_compare().source == "store"
        expected = named_state(Block(1))
        for name, tensor in read_tensors(bench.partition, bench.config()):
            assert torch.equal(tensor, expected[name])
        assert [lease.hold for lease in daemon.leases] == [True, False]
        del tensor
        gc.collect()
        daemon.wait_idle()


def test_without_local_files_and_daemon_the_error_says_what_to_do(bench: Bench) -> None:
    bench.remove_partition()
    with pytest.raises(
        CheckpointMissing, match=r"not on this machine's disk, and no daemon .*; start `sllm-vllm store"
    ):
        bench.load(Block(2))


def test_no_daemon_is_said_once_and_the_disk_is_read(bench: Bench, records: Callable[[int], list[str]]) -> None:
    assert [bench.load_and_compare().source for _ in range(2)] == ["disk", "disk"]
    assert len([line for line in records(logging.INFO) if line.startswith("event=store used=no")]) == 1
    assert records(logging.WARNING) == []


def test_a_daemon_that_refuses_is_a_warning_and_the_disk_is_read(
    bench: Bench, records: Callable[[int], list[str]]
) -> None:
    with bench.daemon(Script(refuses="StoreRefused")):
        assert bench.load_and_compare().source == "disk"
    (line,) = records(logging.WARNING)
    assert "event=store used=no" in line
    assert "ask another" in line


@pytest.mark.parametrize("kind", [CheckpointCorrupt, RemoteUnreachable])
@pytest.mark.parametrize("num_given", [0, 2])
def test_an_error_that_the_daemon_tells_reaches_the_consumer(
    bench: Bench, num_given: int, kind: type[SllmError]
) -> None:
    module = Block(2)
    with bench.daemon(Script(fails_at=(num_given, kind.__name__))) as daemon, pytest.raises(kind, match="mend it"):
        bench.load(module)
    del module, daemon
    gc.collect()
