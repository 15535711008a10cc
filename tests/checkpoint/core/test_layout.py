"""Where tensors lie in a partition: their order, the tail, and no holes."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_vllm.checkpoint.core.layout import TensorSpec, plan_records, tail_offset
from sllm_vllm.checkpoint.core.manifest import TENSOR_ALIGNMENT, Partition, partition_path

WIDTHS = {"int8": 1, "bfloat16": 2, "float32": 4, "int64": 8, "complex128": 16}


def spec(name: str, *shape: int, dtype: str = "int8", aliases: tuple[str, ...] = ()) -> TensorSpec:
    return TensorSpec(name, dtype, shape, WIDTHS[dtype], math.prod(shape) * WIDTHS[dtype], aliases)


def names(*specs: TensorSpec) -> list[str]:
    return [record.name for record in plan_records(specs)]


def test_large_tensors_keep_their_order() -> None:
    assert names(spec("c", 256), spec("a", 1024), spec("b", 512)) == ["c", "a", "b"]


def test_unaligned_tensors_go_last() -> None:
    assert names(spec("a", 255), spec("b", 256), spec("c", 257), spec("d", 512)) == ["b", "d", "a", "c"]


def test_wide_elements_come_first_in_the_tail_and_keep_their_order_otherwise() -> None:
    assert names(
        spec("byte", 3),
        spec("half", 3, dtype="bfloat16"),
        spec("wide", 1, dtype="int64"),
        spec("wide2", 2, dtype="int64"),
    ) == ["wide", "wide2", "half", "byte"]


def test_tensor_without_elements_takes_no_place() -> None:
    records = plan_records([spec("none", 0), spec("a", 256)])
    assert [(record.name, record.offset, record.nbytes) for record in records] == [("a", 0, 256), ("none", 256, 0)]


def test_scalar_lies_in_the_tail() -> None:
    records = plan_records([spec("scalar"), spec("a", 256)])
    assert [(record.name, record.shape, record.offset) for record in records] == [("a", [256], 0), ("scalar", [], 256)]


def test_record_says_what_the_spec_says() -> None:
    (record,) = plan_records([spec("w", 2, 3, dtype="bfloat16", aliases=("tied", "too"))])
    assert record.model_dump() == {
        "name": "w",
        "dtype": "bfloat16",
        "shape": [2, 3],
        "offset": 0,
        "nbytes": 12,
        "aliases": ["tied", "too"],
    }


def test_tail_begins_behind_the_large_tensors() -> None:
    assert tail_offset(plan_records([spec("small", 5), spec("a", 256), spec("b", 512)])) == 768


def test_tail_of_large_tensors_alone_is_at_the_end() -> None:
    assert tail_offset(plan_records([spec("a", 256)])) == 256


def test_tail_of_small_tensors_alone_is_at_the_start() -> None:
    assert tail_offset(plan_records([spec("a", 5), spec("b", 7)])) == 0


def test_no_tensors_have_no_records() -> None:
    assert plan_records([]) == []
    assert tail_offset([]) == 0


SPECS = st.lists(
    st.tuples(st.sampled_from(sorted(WIDTHS)), st.sampled_from([0, 1, 3, 16, 64, 128, 255, 256, 1000, 4096])),
    max_size=12,
).map(lambda kinds: [spec(f"t{i}", length, dtype=dtype) for i, (dtype, length) in enumerate(kinds)])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(SPECS)
def test_any_tensors_make_a_partition_that_keeps_the_format(specs: list[TensorSpec]) -> None:
    records = plan_records(specs)
    nbytes = sum(one.nbytes for one in specs)
    fields = {"rank": 0, "path": partition_path(0), "header_nbytes": 4096, "header_checksum": "0" * 16, "chunks": []}
    Partition.model_validate(fields | {"nbytes": 4096 + nbytes, "tensors": [record.model_dump() for record in records]})
    assert sorted(record.name for record in records) == sorted(one.name for one in specs)
    for record in records:
        width = WIDTHS[record.dtype] if record.nbytes % TENSOR_ALIGNMENT else TENSOR_ALIGNMENT
        assert record.nbytes == 0 or record.offset % width == 0
