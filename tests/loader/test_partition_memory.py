"""A partition's memory: calls of finalisers run one by one, and what can't be mapped is said so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.partition_memory import PartitionMemory, Serial
from tests.support.checkpoints import CHUNK_NBYTES, make_checkpoint
from tests.support.waiting import DEADLINE_S


def test_a_call_made_by_a_call_runs_after_it() -> None:
    serial, said = Serial(), list[str]()

    def outer() -> None:
        serial.run(lambda: said.append("inner"))
        said.append("outer")

    serial.run(outer)
    assert said == ["outer", "inner"]


def test_a_call_made_while_another_thread_is_at_one_is_run_there() -> None:
    serial, began, may_end = Serial(), threading.Event(), threading.Event()
    runners = list[str]()

    def slow() -> None:
        began.set()
        assert may_end.wait(DEADLINE_S)

    thread = threading.Thread(target=lambda: serial.run(slow), name="first")
    thread.start()
    assert began.wait(DEADLINE_S)
    serial.run(lambda: runners.append(threading.current_thread().name))
    assert runners == []
    may_end.set()
    thread.join(DEADLINE_S)
    assert runners == ["first"]


@pytest.fixture
def plan(tmp_path: Path) -> LoadPlan:
    return LoadPlan(make_checkpoint(tmp_path).manifest.partitions[0], CHUNK_NBYTES)


@pytest.fixture
def memory(plan: LoadPlan) -> PartitionMemory:
    memory = PartitionMemory(plan)
    memory.accept_spans(CHUNK_NBYTES, lambda span: None)
    return memory


def test_what_is_not_on_a_page_is_not_mapped(memory: PartitionMemory, tmp_path: Path) -> None:
    with (tmp_path / "zeros").open("wb+") as file:
        file.truncate(4 * CHUNK_NBYTES)
        assert not memory.map_span(0, fd=file.fileno(), file_offset=512)
        assert memory.map_span(0, fd=file.fileno(), file_offset=0)


def test_there_are_not_more_mappings_than_allowed(
    memory: PartitionMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllm_vllm.loader.partition_memory.MAPPED_SPANS_MAX", 2)
    with (tmp_path / "zeros").open("wb+") as file:
        file.truncate(4 * CHUNK_NBYTES)
        mapped = [memory.map_span(span, fd=file.fileno(), file_offset=0) for span in range(4)]
    assert mapped == [True, True, False, False]


def test_what_the_system_does_not_map_is_left_as_it_was(memory: PartitionMemory) -> None:
    memory.chunk(0)[:4] = b"here"
    assert not memory.map_span(0, fd=-1, file_offset=0)
    assert bytes(memory.chunk(0)[:4]) == b"here"


def test_a_span_is_released_when_the_last_of_its_tensors_is_settled(plan: LoadPlan, tmp_path: Path) -> None:
    memory, released = PartitionMemory(plan), list[int]()
    memory.accept_spans(CHUNK_NBYTES, released.append)
    num_spans = len(plan.order)
    with (tmp_path / "zeros").open("wb+") as file:
        file.truncate(num_spans * CHUNK_NBYTES)
        for span in range(num_spans):
            assert memory.map_span(span, fd=file.fileno(), file_offset=span * CHUNK_NBYTES)
    arrays = [memory.claim(tensor) for tensor in range(len(plan.partition.tensors))]
    assert released == []
    assert memory.claim(0) is None
    names = [tensor.name for tensor in plan.partition.tensors]
    arrays[names.index("embed")] = None
    assert released == [0, 1, 2]
    arrays.clear()
    assert sorted(released) == list(range(num_spans))


def test_what_nobody_claims_is_settled_in_the_end(plan: LoadPlan, tmp_path: Path) -> None:
    memory, released = PartitionMemory(plan), list[int]()
    memory.accept_spans(CHUNK_NBYTES, released.append)
    with (tmp_path / "zeros").open("wb+") as file:
        file.truncate(CHUNK_NBYTES)
        assert memory.map_span(1, fd=file.fileno(), file_offset=0)
    names = [tensor.name for tensor in plan.partition.tensors]
    array = memory.claim(names.index("embed"))
    memory.settle_rest()
    memory.settle_rest()
    assert released == []
    del array
    assert released == [1]
