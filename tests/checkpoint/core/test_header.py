"""The safetensors header: what is built is what is accepted, and nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from sllm_vllm.checkpoint.core.dtypes import DTYPE_CODES, ITEM_NBYTES_MAX, safetensors_view
from sllm_vllm.checkpoint.core.header import LENGTH_NBYTES, build_header, check_header, parse_header_length
from sllm_vllm.checkpoint.core.manifest import TensorRecord
from sllm_vllm.config import HEADER_NBYTES_MAX
from sllm_vllm.errors import CheckpointInvalid
from tests.support.cases import every_case
from tests.support.checkpoints import assert_says_where_and_mend

PATH = "partitions/rank-00000.safetensors"
RECORDS = [
    TensorRecord(name="a", dtype="float32", shape=[1, 64], offset=0, nbytes=256, aliases=["tied"]),
    TensorRecord(name="b", dtype="complex128", shape=[3], offset=256, nbytes=48),
    TensorRecord(name="π \"'", dtype="bool", shape=[], offset=304, nbytes=1),
]


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


def entries() -> dict[str, Any]:
    raw = build_header(RECORDS)
    value: dict[str, Any] = json.loads(raw[LENGTH_NBYTES:])
    return value


def refusal(raw: bytes) -> str:
    with pytest.raises(CheckpointInvalid) as refused:
        check_header(raw, RECORDS, PATH)
    assert_says_where_and_mend(refused.value, PATH)
    return str(refused.value)


def test_built_header_is_accepted() -> None:
    check_header(build_header(RECORDS), RECORDS, PATH)


@every_case("num_tensors", [0, 1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 400])
def test_data_starts_on_a_page(num_tensors: int) -> None:
    records = [TensorRecord(name=f"t{i}", dtype="int8", shape=[1], offset=i, nbytes=1) for i in range(num_tensors)]
    raw = build_header(records)
    assert len(raw) % 4096 == 0
    assert parse_header_length(raw, PATH) == len(raw)
    assert len(raw) - len(raw.rstrip(b" ")) < 4096


def test_header_shows_names_without_aliases() -> None:
    assert list(entries()) == ["__metadata__", "a", "b", "π \"'"]


def test_unknown_dtype_is_shown_as_bytes() -> None:
    assert entries()["b"] == {"dtype": "U8", "shape": [3, 16], "data_offsets": [256, 304]}


@every_case("dtype", DTYPE_CODES)
def test_known_dtype_is_shown_by_its_code(dtype: str) -> None:
    code, item_nbytes = DTYPE_CODES[dtype]
    assert safetensors_view(dtype, (2, 3), item_nbytes) == (code, [2, 3])
    assert 1 <= item_nbytes <= ITEM_NBYTES_MAX


@every_case("length", [0, HEADER_NBYTES_MAX + 1, 1 << 63, (1 << 64) - 1])
def test_impossible_length_is_refused(length: int) -> None:
    assert "impossible length" in refusal(length.to_bytes(LENGTH_NBYTES, "little") + bytes(64))


@every_case("raw", [b"", b"\x01", b"\x01" * 7])
def test_header_shorter_than_its_length_field_is_refused(raw: bytes) -> None:
    assert "impossible length" in refusal(raw)


@every_case("change", [-1, 1])
def test_length_that_differs_from_the_manifests_is_refused(change: int) -> None:
    raw = build_header(RECORDS)
    length = int.from_bytes(raw[:LENGTH_NBYTES], "little") + change
    assert "another length" in refusal(length.to_bytes(LENGTH_NBYTES, "little") + raw[LENGTH_NBYTES:])


@every_case("text", [b"[]", b"{", b"\xff\xff", b"{" * 5000, b'{"a": NaN}'])
def test_header_that_is_no_json_object_is_refused(text: bytes) -> None:
    assert "safetensors header" in refusal(with_length(text))


def test_key_that_is_there_twice_is_refused() -> None:
    raw = build_header(RECORDS).rstrip(b" }")
    assert "key 'a' is there twice" in refusal(with_length(raw[LENGTH_NBYTES:] + b'},"a":{}}'))


@every_case(
    "change",
    [
        {"dtype": "F64"},
        {"shape": [64]},
        {"shape": [64, 1]},
        {"shape": [1.0, 64]},
        {"shape": [True, 64]},
        {"data_offsets": [0, 255]},
        {"data_offsets": [False, 256]},
        {"data_offsets": [0.0, 256]},
        {"data_offsets": None},
        {"extra": 1},
    ],
)
def test_entry_that_differs_from_the_manifest_is_refused(change: dict[str, Any]) -> None:
    value = entries()
    value["a"] |= change
    assert "tensor 'a' is not as the manifest says" in refusal(with_length(json.dumps(value).encode()))


@every_case("entry", [None, [], 1, "F32", {}])
def test_entry_of_another_kind_is_refused(entry: object) -> None:
    assert "tensor 'b' is not as" in refusal(with_length(json.dumps(entries() | {"b": entry}).encode()))


def test_missing_tensor_is_refused() -> None:
    value = entries()
    del value["b"]
    assert "tensor 'b' is not as the manifest says" in refusal(with_length(json.dumps(value).encode()))


def test_tensor_that_the_manifest_lacks_is_refused() -> None:
    value = entries() | {"more\n": copy.deepcopy(entries()["a"])}
    assert r"tensor 'more\n' is missing in the manifest" in refusal(with_length(json.dumps(value).encode()))


def test_header_without_metadata_is_accepted() -> None:
    value = entries()
    del value["__metadata__"]
    check_header(with_length(json.dumps(value).encode()), RECORDS, PATH)


@every_case("metadata", [None, [], 5, "x", {"a": 1}, {"a": {}}])
def test_metadata_that_safetensors_refuses_is_refused(metadata: object) -> None:
    assert "metadata" in refusal(with_length(json.dumps(entries() | {"__metadata__": metadata}).encode()))
