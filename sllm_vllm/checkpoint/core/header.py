"""Builds and checks the safetensors header of a partition. Pure.

The layout is the standard safetensors one: eight bytes of length (little-endian), then that many bytes of JSON.
The JSON is padded with spaces so that the data starts on a 4096-byte boundary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sllm_vllm.checkpoint.core.dtypes import safetensors_view
from sllm_vllm.checkpoint.core.manifest import DATA_ALIGNMENT, FORMAT_NAME, TensorRecord, parse_json
from sllm_vllm.config import HEADER_NBYTES_MAX
from sllm_vllm.errors import CheckpointInvalid
from sllm_vllm.units import round_up

LENGTH_NBYTES = 8


def build_header(tensors: Sequence[TensorRecord]) -> bytes:
    """Build the header of a partition that holds ``tensors``. Its length is a multiple of ``DATA_ALIGNMENT``."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "layout": FORMAT_NAME}}
    for tensor in tensors:
        dtype, shape = safetensors_view(tensor.dtype, tuple(tensor.shape), tensor.item_nbytes)
        entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [tensor.offset, tensor.end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    nbytes = round_up(LENGTH_NBYTES + len(text), DATA_ALIGNMENT)
    return (nbytes - LENGTH_NBYTES).to_bytes(LENGTH_NBYTES, "little") + text.ljust(nbytes - LENGTH_NBYTES)


def parse_header_length(raw: bytes, path: str) -> int:
    """Return the size in bytes of the whole header, read from its first eight bytes.

    Raises:
        CheckpointInvalid: the length is zero or too large, or ``raw`` has fewer than eight bytes.
    """
    length = int.from_bytes(raw[:LENGTH_NBYTES], "little")
    if len(raw) < LENGTH_NBYTES or not 0 < length <= HEADER_NBYTES_MAX:
        raise CheckpointInvalid(path, "its safetensors header has an impossible length", "convert the model again")
    return LENGTH_NBYTES + length


def check_header(raw: bytes, tensors: Sequence[TensorRecord], path: str) -> None:
    """Check that a partition's header matches the manifest's tensor records.

    Raises:
        CheckpointInvalid: the header is malformed, or differs from the manifest.
    """
    if parse_header_length(raw, path) != len(raw):
        raise CheckpointInvalid(
            path, "its safetensors header has another length than it says", "convert the model again"
        )
    found = parse_json(raw[LENGTH_NBYTES:], path, "safetensors header")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointInvalid(path, "its safetensors metadata is not a map of strings", "convert the model again")
    for tensor in tensors:
        dtype, shape = safetensors_view(tensor.dtype, tuple(tensor.shape), tensor.item_nbytes)
        wanted = {"dtype": dtype, "shape": shape, "data_offsets": [tensor.offset, tensor.end]}
        entry = found.pop(tensor.name, None)
        if entry != wanted or not _has_integers_alone(entry):
            problem = f"tensor {tensor.name!r} is not as the manifest says"
            raise CheckpointInvalid(path, problem, "convert the model again")
    if found:
        problem = f"tensor {next(iter(found))!r} is missing in the manifest"
        raise CheckpointInvalid(path, problem, "convert the model again")


def _has_integers_alone(entry: dict[str, list[Any]]) -> bool:
    """Whether all numbers of an entry are ints. Python treats 1, 1.0 and True as equal; other readers do not."""
    return all(type(number) is int for number in (*entry["shape"], *entry["data_offsets"]))
