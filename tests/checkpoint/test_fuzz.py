"""Mutated manifests and headers: only our own errors come out, and what is accepted keeps every rule."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.core.header import build_header, check_header
from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, Manifest, parse_manifest, partition_path
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint, verify_checkpoint
from sllm_vllm.errors import CheckpointError, CheckpointInvalid
from tests.support.checkpoints import assert_says_where_and_mend, make_checkpoint, make_key


def fuzzed(examples_max: int) -> settings:
    """The same examples each time."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples_max,
        suppress_health_check=[HealthCheck.too_slow],
    )


JsonPath = tuple[str | int, ...]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("store"), key=make_key(2))


@pytest.fixture(scope="module")
def manifest_bytes(original: Checkpoint) -> bytes:
    return (original.path / MANIFEST_NAME).read_bytes()


def json_paths(value: object, path: JsonPath = ()) -> Iterator[JsonPath]:
    """Where there is a value in a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from json_paths(child, (*path, key))


EDGES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 4095, 4096, 4097, 8192, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**400,
    0.0, 1.0, 4096.0, 1e308, float("nan"), float("inf"), "", "0", "a", "..", "/", "../x", "\x00", "\n", "\ud800",
    "0" * 16, "f" * 16, "float32", "int4", "complex128", "x" * 5000, [], [[]], [0], [1, 1], {}, {"": {}},
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(EDGES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 1 << 65) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ),
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove, double or swap values anywhere in a JSON document, up to three times."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in json_paths(value) if path]
        if not paths:
            return value
        path = draw(st.sampled_from(paths))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "nudge", "remove", "double", "copy"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[int(path[-1])]))
        elif kind == "nudge" and type(parent[path[-1]]) is int:
            parent[path[-1]] += draw(st.sampled_from([-4096, -256, -1, 1, 2, 256, 4096]))
        elif kind == "copy":
            parent[path[-1]] = copy.deepcopy(_at(value, draw(st.sampled_from(paths))))
        else:
            parent[path[-1]] = draw(VALUES)
    return value


def _at(value: Any, path: JsonPath) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def raw_edits(draw: st.DrawFn) -> list[tuple[float, str, bytes]]:
    """Where, by which fraction of the length; what; with which bytes."""
    where = st.floats(0, 1, exclude_max=True)
    what = st.sampled_from(["flip", "insert", "cut", "truncate"])
    some = st.binary(min_size=1, max_size=4) | st.sampled_from([b'"', b"{", b"]", b",", b"NaN", b"1e999", b"\\ud800"])
    return draw(st.lists(st.tuples(where, what, some), min_size=1, max_size=4))


def edited(raw: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for fraction, what, data in edits:
        at = int(fraction * len(raw))
        if what == "insert":
            raw = raw[:at] + data + raw[at:]
        elif what == "cut":
            raw = raw[:at] + raw[at + len(data) :]
        elif what == "truncate":
            raw = raw[:at]
        elif raw:
            raw = raw[:at] + bytes([raw[at] ^ (1 << data[0] % 8)]) + raw[at + 1 :]
    return raw


def assert_keeps_the_format(manifest: Manifest) -> None:
    """FORMAT.md's MUSTs, told once more in other words."""
    assert (manifest.format, manifest.version) == ("sllm-checkpoint", 1)
    assert 4096 <= manifest.chunk_nbytes <= 1 << 30
    assert manifest.chunk_nbytes % 4096 == 0
    assert len(manifest.partitions) == manifest.layout.num_partitions
    for rank, partition in enumerate(manifest.partitions):
        assert (partition.rank, partition.path) == (rank, partition_path(rank))
        assert partition.header_nbytes % 4096 == 0
        assert 0 < partition.header_nbytes <= partition.nbytes
        assert sum(tensor.nbytes for tensor in partition.tensors) == partition.data_nbytes
        assert len(partition.chunks) == math.ceil(partition.data_nbytes / manifest.chunk_nbytes)
        assert all(re.fullmatch("[0-9a-f]{16}", text) for text in (partition.header_checksum, *partition.chunks))
        names = [name for tensor in partition.tensors for name in (tensor.name, *tensor.aliases)]
        assert len(names) == len(set(names))
        end = 0
        for tensor in partition.tensors:
            assert all(type(size) is int and size >= 0 for size in tensor.shape)
            assert (type(tensor.offset), tensor.offset) == (int, end)
            assert tensor.nbytes == math.prod(tensor.shape) * tensor.item_nbytes
            assert tensor.offset % min(256, tensor.nbytes & -tensor.nbytes or 1, tensor.item_nbytes) == 0
            end = tensor.end


def accept_or_refuse(raw: bytes) -> None:
    try:
        manifest = parse_manifest(raw, "the/manifest")
    except CheckpointInvalid as error:
        assert_says_where_and_mend(error, "the/manifest")
    else:
        assert_keeps_the_format(manifest)
        assert parse_manifest(manifest.model_dump_json().encode(), "again") == manifest


@fuzzed(1000)
@given(st.data())
def test_manifest_with_other_values_is_refused_or_keeps_the_format(manifest_bytes: bytes, data: st.DataObject) -> None:
    accept_or_refuse(json.dumps(data.draw(mutated(json.loads(manifest_bytes)))).encode())


@fuzzed(1000)
@given(raw_edits())
def test_manifest_with_other_bytes_is_refused_or_keeps_the_format(
    manifest_bytes: bytes, edits: list[tuple[float, str, bytes]]
) -> None:
    accept_or_refuse(edited(manifest_bytes, edits))


@fuzzed(500)
@given(st.binary(max_size=64))
def test_random_bytes_are_no_manifest(raw: bytes) -> None:
    with pytest.raises(CheckpointInvalid):
        parse_manifest(raw, "the/manifest")


@pytest.fixture(scope="module")
def header_value(original: Checkpoint) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(build_header(original.manifest.partitions[0].tensors)[8:])
    return value


def accept_or_refuse_header(original: Checkpoint, raw: bytes) -> None:
    """What is accepted must say of every tensor what the manifest says, and of no other."""
    records = original.manifest.partitions[0].tensors
    try:
        check_header(raw, records, "the/partition")
    except CheckpointInvalid as error:
        assert_says_where_and_mend(error, "the/partition")
        return
    entries = json.loads(raw[8:])
    entries.pop("__metadata__", None)
    assert entries.keys() == {record.name for record in records}
    for record in records:
        wanted = [record.offset, record.end]
        assert json.dumps(entries[record.name]["data_offsets"]) == json.dumps(wanted)
        assert json.dumps(entries[record.name]["shape"]) == json.dumps(record.shape)


@fuzzed(500)
@given(st.data())
def test_header_with_other_values_is_refused_or_agrees(
    original: Checkpoint, header_value: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(data.draw(mutated(header_value))).encode()
    accept_or_refuse_header(original, len(text).to_bytes(8, "little") + text)


@fuzzed(500)
@given(raw_edits())
def test_header_with_other_bytes_is_refused_or_agrees(
    original: Checkpoint, edits: list[tuple[float, str, bytes]]
) -> None:
    raw = build_header(original.manifest.partitions[0].tensors).rstrip(b" ")
    accept_or_refuse_header(original, edited(raw, edits))
    text = edited(raw[8:], edits)  # with a length that fits
    accept_or_refuse_header(original, len(text).to_bytes(8, "little") + text)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("scratch"))


@fuzzed(150)
@given(st.data())
def test_checkpoint_with_another_manifest_is_refused_or_verified(scratch: Checkpoint, data: st.DataObject) -> None:
    """Through the files: with sizes that fit no file, none is read past its end and no memory is taken for them."""
    value = data.draw(mutated(scratch.manifest.model_dump()))
    (scratch.path / MANIFEST_NAME).write_text(json.dumps(value))
    try:
        assert verify_checkpoint(open_checkpoint(scratch.path)) == scratch.manifest.nbytes
    except CheckpointError as error:
        assert_says_where_and_mend(error, str(scratch.path))


@fuzzed(150)
@given(st.booleans(), raw_edits())
def test_partition_with_other_bytes_is_refused(
    scratch: Checkpoint, signs: bool, edits: list[tuple[float, str, bytes]]
) -> None:
    """Also with a header whose checksum was made to fit."""
    record = scratch.manifest.partitions[0]
    raw = (scratch.path / record.path).read_bytes()
    changed = (
        edited(raw[: record.header_nbytes], edits).ljust(4096)[:4096] + raw[4096:] if signs else edited(raw, edits)
    )
    forged = record.model_copy(update={"header_checksum": checksum(changed[: record.header_nbytes])} if signs else {})
    checkpoint = Checkpoint(scratch.path, scratch.manifest.model_copy(update={"partitions": [forged]}))
    (scratch.path / record.path).write_bytes(changed)
    try:
        verify_checkpoint(checkpoint)
        assert changed == raw or signs
    except CheckpointError as error:
        assert_says_where_and_mend(error, str(scratch.path))
    finally:
        (scratch.path / record.path).write_bytes(raw)
