"""What a manifest may say, and how each way to break it is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from sllm_vllm.checkpoint.core.manifest import (
    FORMAT_NAME,
    Manifest,
    Partition,
    TensorRecord,
    num_chunks,
    parse_json,
    parse_manifest,
    partition_path,
)
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.errors import CheckpointInvalid
from tests.support.cases import every_case
from tests.support.checkpoints import assert_says_where_and_mend

PATH = "store/model/manifest.json"
CHECKSUM = "0123456789abcdef"

VALID: dict[str, Any] = {
    "format": FORMAT_NAME,
    "version": 1,
    "created_by": "a test",
    "source": {"model": "org/tiny", "revision": None, "fingerprint": "f0"},
    "layout": {
        "model_class": "Llama",
        "dtype": "bfloat16",
        "num_partitions": 2,
        "device_type": "cpu",
        "vllm_version": "0.1",
        "config_digest": "00",
    },
    "chunk_nbytes": 4096,
    "partitions": [
        {
            "rank": rank,
            "path": f"partitions/rank-0000{rank}.safetensors",
            "nbytes": 4096 + 8192 + 20,
            "header_nbytes": 4096,
            "header_checksum": CHECKSUM,
            "tensors": [
                {"name": "a", "dtype": "float32", "shape": [64, 16], "offset": 0, "nbytes": 4096, "aliases": ["tied"]},
                {"name": "b", "dtype": "bits16", "shape": [2048], "offset": 4096, "nbytes": 4096, "aliases": []},
                {"name": "c", "dtype": "float32", "shape": [4], "offset": 8192, "nbytes": 16, "aliases": []},
                {"name": "empty", "dtype": "int4", "shape": [0, 4], "offset": 8208, "nbytes": 0, "aliases": []},
                {"name": "d", "dtype": "bfloat16", "shape": [2], "offset": 8208, "nbytes": 4, "aliases": []},
            ],
            "chunks": [CHECKSUM] * 3,
        }
        for rank in range(2)
    ],
}


def parse(value: object) -> Manifest:
    return parse_manifest(json.dumps(value).encode(), PATH)


def refusal(raw: bytes) -> str:
    """The message with which `raw` is refused, held against the rules for messages."""
    with pytest.raises(CheckpointInvalid) as refused:
        parse_manifest(raw, PATH)
    assert_says_where_and_mend(refused.value, PATH)
    return str(refused.value)


def partition(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["partitions"][0].update(changes)


def tensor(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["partitions"][0]["tensors"][index].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(changes)


def layout(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["layout"].update(changes)


def without(*keys: str | int) -> Callable[[dict[str, Any]], None]:
    def remove(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return remove


def swapped(first: int, second: int) -> Callable[[dict[str, Any]], None]:
    """Two tensors exchanged, their offsets put right."""

    def change(value: dict[str, Any]) -> None:
        tensors, offset = value["partitions"][0]["tensors"], 0
        tensors[first], tensors[second] = tensors[second], tensors[first]
        for record in tensors:
            record["offset"] = offset
            offset += record["nbytes"]

    return change


def test_valid_manifest_is_accepted_whole() -> None:
    manifest = parse(VALID)
    assert manifest.model_dump(exclude_unset=True) == VALID
    assert manifest.nbytes == 2 * (4096 + 8192 + 20)
    assert manifest.partitions[1].data_nbytes == 8192 + 20


def test_written_manifest_reads_back_equal() -> None:
    manifest = parse(VALID)
    assert parse_manifest(manifest.model_dump_json().encode(), PATH) == manifest


def test_unknown_keys_are_ignored() -> None:
    value = copy.deepcopy(VALID)
    for part in (value, value["source"], value["layout"], value["partitions"][0], value["partitions"][0]["tensors"][0]):
        part["from_the_future"] = {"x": [1, 2.5, None]}
    assert parse(value) == parse(VALID)


def test_item_size_is_the_dtypes_own_or_follows_from_the_size() -> None:
    sizes = [record.item_nbytes for record in parse(VALID).partitions[0].tensors]
    assert sizes == [4, 2, 4, 1, 2]


def test_partition_without_tensors_is_accepted() -> None:
    value = copy.deepcopy(VALID)
    value["partitions"][0] |= {"tensors": [], "chunks": [], "nbytes": 4096}
    assert parse(value).partitions[0].data_nbytes == 0


HUGE = 1 << 63
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "wrong format": (top(format="safetensors"), "format is 'safetensors', not 'sllm-checkpoint'"),
    "no format": (without("format"), "format is None"),
    "format is huge": (top(format=["x" * 9999] * 999), "format is ["),
    "newer version": (top(version=2), "format version 2 is unknown; install a newer sllm-vllm"),
    "no version": (without("version"), "format version None is unknown"),
    "version is a float": (top(version=1.0), "format version 1.0 is unknown"),
    "version is a bool": (top(version=True), "format version True is unknown"),
    "version is a text": (top(version="1"), "format version '1' is unknown"),
    "no source": (without("source"), "source: "),
    "no fingerprint": (without("source", "fingerprint"), "source.fingerprint: "),
    "no partitions": (without("partitions"), "partitions: "),
    "no tensors": (without("partitions", 0, "tensors"), "partitions.0.tensors: "),
    "no chunks": (without("partitions", 1, "chunks"), "partitions.1.chunks: "),
    "partition is null": (top(partitions=[None]), "partitions.0: "),
    "chunk size 0": (top(chunk_nbytes=0), "chunk_nbytes: "),
    "chunk size unaligned": (top(chunk_nbytes=5000), "chunk_nbytes: "),
    "chunk size huge": (top(chunk_nbytes=1 << 40), "chunk_nbytes: "),
    "chunk size is a float": (top(chunk_nbytes=4096.0), "chunk_nbytes: "),
    "parallel size 0": (layout(tensor_parallel_size=0), "layout.tensor_parallel_size: "),
    "too many partitions": (layout(num_partitions=100_000), "layout.num_partitions: "),
    "rank missing": (layout(num_partitions=3), "partitions of ranks [0, 1], but the layout has 3"),
    "rank too many": (layout(num_partitions=1), "partitions of ranks [0, 1], but the layout has 1"),
    "ranks out of order": (lambda value: value["partitions"].reverse(), "partitions of ranks [1, 0]"),
    "no partition at all": (top(partitions=[]), "partitions of ranks []"),
    "rank is negative": (partition(rank=-1), "partitions.0.rank: "),
    "rank is a bool": (partition(rank=False), "partitions.0.rank: "),
    "path leads upwards": (partition(path="../rank-00000.safetensors"), "is refused"),
    "path leads upwards inside": (partition(path="partitions/../partitions/rank-00000.safetensors"), "is refused"),
    "path is absolute": (partition(path="/partitions/rank-00000.safetensors"), "is refused"),
    "path of another rank": (partition(path=partition_path(1)), "is refused"),
    "path of lines": (partition(path="a\nb\x1b[2J"), "is refused"),
    "header unaligned": (partition(header_nbytes=4100), "no multiple of 4096"),
    "header too small": (partition(header_nbytes=0), "partitions.0.header_nbytes: "),
    "header too large": (partition(header_nbytes=1 << 27), "partitions.0.header_nbytes: "),
    "checksum too short": (partition(header_checksum="0" * 15), "not 16 hexadecimal digits"),
    "checksum in capitals": (partition(chunks=["0123456789ABCDEF"] * 3), "not 16 hexadecimal digits"),
    "checksum ends a line": (partition(chunks=[CHECKSUM, CHECKSUM, CHECKSUM + "\n"]), "not 16 hexadecimal digits"),
    "checksum is a number": (partition(chunks=[0] * 3), "partitions.0.chunks.0: "),
    "checksum too few": (partition(chunks=[CHECKSUM] * 2), "2 checksums do not fit"),
    "checksum too many": (partition(chunks=[CHECKSUM] * 4), "4 checksums do not fit"),
    "ends before its header": (partition(nbytes=100), "of -3996 data bytes"),
    "data too short": (partition(nbytes=4096 + 8192), "tensors end at 8212 of 8192"),
    "data too long": (partition(nbytes=4096 + 9000), "tensors end at 8212 of 9000"),
    "data without tensors": (partition(tensors=[]), "tensors end at 0"),
    "size is huge": (partition(nbytes=HUGE), "partitions.0.nbytes: "),
    "name is empty": (tensor(0, name=""), "partitions.0.tensors.0.name: "),
    "name is long": (tensor(0, name="x" * 4097), "partitions.0.tensors.0.name: "),
    "name is safetensors' own": (tensor(0, name="__metadata__"), "keeps for itself"),
    "name is no Unicode": (tensor(0, name="\ud800"), "surrogates not allowed"),
    "name is there twice": (tensor(1, name="a"), "tensor 'a' is there twice"),
    "name is an alias": (tensor(1, name="tied"), "tensor 'tied' is there twice"),
    "alias is its own name": (tensor(0, aliases=["a"]), "tensor 'a' is there twice"),
    "alias is there twice": (tensor(0, aliases=["x", "x"]), "tensor 'x' is there twice"),
    "alias of two": (tensor(1, aliases=["tied"]), "tensor 'tied' is there twice"),
    "alias is empty": (tensor(0, aliases=[""]), "partitions.0.tensors.0.aliases.0: "),
    "dtype is a path": (tensor(0, dtype="../x"), "partitions.0.tensors.0.dtype: "),
    "dtype ends a line": (tensor(0, dtype="float32\n"), "partitions.0.tensors.0.dtype: "),
    "dtype of another size": (tensor(0, dtype="float16"), "does not take 4096 bytes"),
    "shape of another size": (tensor(0, shape=[64, 17]), "does not take 4096 bytes"),
    "shape is negative": (tensor(0, shape=[-64, -16]), "partitions.0.tensors.0.shape.0: "),
    "shape is a float": (tensor(0, shape=[64.0, 16]), "partitions.0.tensors.0.shape.0: "),
    "shape is a bool": (tensor(0, shape=[True, 1024]), "partitions.0.tensors.0.shape.0: "),
    "shape has huge numbers": (tensor(0, shape=[HUGE, 0]), "partitions.0.tensors.0.shape.0: "),
    "shape overflows": (tensor(0, shape=[1 << 62] * 64), "does not take 4096 bytes"),
    "shape is long": (tensor(0, shape=[1] * 65), "partitions.0.tensors.0.shape: "),
    "elements are too wide": (tensor(1, shape=[128]), "does not take 4096 bytes"),
    "elements are no whole bytes": (tensor(1, shape=[2047]), "does not take 4096 bytes"),
    "offset overlaps": (tensor(1, offset=4095), "starts at 4095, the last ended at 4096"),
    "offset leaves a hole": (tensor(1, offset=4097), "starts at 4097, the last ended at 4096"),
    "offset behind the end": (tensor(4, offset=1 << 40), "the last ended at 8208"),
    "offset is negative": (tensor(0, offset=-4096), "partitions.0.tensors.0.offset: "),
    "offset is a float": (tensor(0, offset=0.0), "partitions.0.tensors.0.offset: "),
    "offset is a bool": (tensor(0, offset=False), "partitions.0.tensors.0.offset: "),
    "bytes are a bool": (tensor(4, nbytes=True), "partitions.0.tensors.4.nbytes: "),
    "large tensor in the tail": (swapped(1, 2), "tensor 'b' may not lie behind smaller or narrower ones"),
    "wide elements behind narrow": (swapped(2, 4), "tensor 'c' may not lie behind smaller or narrower ones"),
}


@every_case("name", BROKEN)
def test_broken_manifest_is_refused(name: str) -> None:
    change, told = BROKEN[name]
    value = copy.deepcopy(VALID)
    change(value)
    assert told in refusal(json.dumps(value).encode())


@every_case("constant", ["NaN", "Infinity", "-Infinity"])
def test_number_that_is_none_is_refused_everywhere(constant: str) -> None:
    raw = json.dumps(VALID | {"ignored": "HERE"}).replace('"HERE"', constant)
    assert f"{constant} is not a number" in refusal(raw.encode())


def test_keys_that_are_there_twice_are_refused_at_every_depth() -> None:
    text = json.dumps(VALID)
    for key in ("version", "model", "rank", "offset"):
        doubled = re.sub(rf'"{key}": ', f'"{key}": 0, "{key}": ', text, count=1)
        assert f"key '{key}' is there twice" in refusal(doubled.encode())


def test_doubled_key_among_very_many_is_found_at_once() -> None:
    """In time proportional to the number of keys: with its square, this would take an hour."""
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    assert "key '299999' is there twice" in refusal(f'{{{keys},"299999":0}}'.encode())


def test_truncated_manifest_is_refused_at_every_length() -> None:
    raw = json.dumps(VALID).encode()
    for length in range(len(raw)):
        refusal(raw[:length])


@every_case(
    "raw",
    [b"[]", b"null", b"1", b'"text"', b"", b"{}{}", b"\x00" * 64, b"{" * 100_000, b"[" * 100_000, b'{"a":' * 100_000],
)
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    refusal(raw)


@every_case("depth", [900, 950, 960, 970, 975, 980, 985, 990, 995])
def test_deep_value_in_place_of_the_format_is_refused(depth: int) -> None:
    refusal(b'{"format": ' + b"[" * depth + b"]" * depth + b"}")


@every_case("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encoding_than_utf8_is_refused(encoding: str) -> None:
    refusal(json.dumps(VALID).encode(encoding))


def test_bytes_that_are_no_utf8_are_refused() -> None:
    refusal(json.dumps(VALID).encode().replace(b"a test", b"\xff\xfe"))


def test_number_of_very_many_digits_is_refused() -> None:
    refusal(json.dumps(VALID).encode().replace(b'"version": 1', b'"version": ' + b"9" * 10_000))


def test_manifest_above_the_limit_is_refused_unparsed() -> None:
    assert "too large for a manifest" in refusal(bytes(MANIFEST_NBYTES_MAX + 1))


def test_parse_json_names_what_it_was_given() -> None:
    with pytest.raises(CheckpointInvalid, match="a/file: the tea is not a JSON object"):
        parse_json(b"[1]", "a/file", "tea")


def test_records_are_frozen() -> None:
    record = TensorRecord(name="a", dtype="int8", shape=[1], offset=0, nbytes=1)
    with pytest.raises(ValueError, match="frozen"):
        record.offset = 1


@every_case("data_nbytes, wanted", [(0, 0), (1, 1), (4095, 1), (4096, 1), (4097, 2), (1 << 40, 1 << 28)])
def test_chunks_cover_the_data(data_nbytes: int, wanted: int) -> None:
    assert num_chunks(data_nbytes, 4096) == wanted


def test_partition_has_its_place_by_rank() -> None:
    assert partition_path(0) == "partitions/rank-00000.safetensors"
    assert partition_path(99_998) == "partitions/rank-99998.safetensors"
    assert Partition.model_validate(VALID["partitions"][1]).path == partition_path(1)
