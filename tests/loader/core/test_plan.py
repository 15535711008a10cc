"""The load plan: every byte of every tensor is copied once, small tensors are read first, readiness is honest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm_vllm.checkpoint.core.layout import TensorSpec, plan_records
from sllm_vllm.checkpoint.core.manifest import Partition, num_chunks, partition_path
from sllm_vllm.loader.core.plan import LoadPlan

CHUNK_NBYTES = 4096


def plan_of(sizes: list[int]) -> LoadPlan:
    records = plan_records(
        [TensorSpec(f"t{i}", "uint8", (size,), item_nbytes=1, nbytes=size) for i, size in enumerate(sizes)]
    )
    data_nbytes = sum(sizes)
    partition = Partition(
        rank=0,
        path=partition_path(0),
        nbytes=4096 + data_nbytes,
        header_nbytes=4096,
        header_checksum="0" * 16,
        tensors=records,
        chunks=["0" * 16] * num_chunks(data_nbytes, CHUNK_NBYTES),
    )
    return LoadPlan(partition, CHUNK_NBYTES)


def test_chunks_with_small_tensors_are_read_first() -> None:
    plan = plan_of([8192, 8192, 10])
    assert plan.order == (4, 0, 1, 2, 3)


def test_a_partition_without_data_has_an_empty_order() -> None:
    assert plan_of([0, 0]).order == ()
    assert plan_of([0]).ready_position(0) == -1


def test_a_tensor_is_ready_with_the_last_of_its_chunks() -> None:
    plan = plan_of([8192, 8192])
    assert [plan.ready_position(index) for index in (0, 1)] == [1, 3]


@given(st.lists(st.integers(0, 3 * CHUNK_NBYTES) | st.integers(0, 48).map(lambda n: n * 256), max_size=12))
def test_copies_cover_each_byte_of_each_tensor_once(sizes: list[int]) -> None:
    plan = plan_of(sizes)
    assert sorted(plan.order) == list(range(num_chunks(sum(sizes), CHUNK_NBYTES)))
    for index, record in enumerate(plan.partition.tensors):
        copies = [copy for chunk in plan.copies for copy in chunk if copy.tensor == index]
        covered = [byte for c in copies for byte in range(c.tensor_offset, c.tensor_offset + c.nbytes)]
        assert covered == list(range(record.nbytes))
        places = [
            chunk * CHUNK_NBYTES + copy.chunk_offset - copy.tensor_offset
            for chunk, copies_of in enumerate(plan.copies)
            for copy in copies_of
            if copy.tensor == index
        ]
        assert set(places) <= {record.offset}


@given(st.lists(st.integers(0, 3 * CHUNK_NBYTES), min_size=1, max_size=12))
def test_at_its_ready_position_all_chunks_of_a_tensor_were_read(sizes: list[int]) -> None:
    plan = plan_of(sizes)
    for index in range(len(plan.partition.tensors)):
        needed = {chunk for chunk, copies in enumerate(plan.copies) if any(copy.tensor == index for copy in copies)}
        read = set(plan.order[: plan.ready_position(index) + 1])
        assert needed <= read
        assert not needed <= set(plan.order[: max(plan.ready_position(index), 0)]) or not needed
