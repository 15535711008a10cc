"""The manifest: what a checkpoint holds and how to check it. Pure: text in, frozen records out.

A manifest is untrusted input: its size is bounded before parsing, its paths can only name the checkpoint's own
partitions, and every offset must lie inside its file. A ``Manifest`` object satisfies every MUST of FORMAT.md.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from sllm_vllm.checkpoint.core.dtypes import DTYPE_CODES, ITEM_NBYTES_MAX
from sllm_vllm.config import (
    CHUNK_NBYTES_MAX,
    CHUNK_NBYTES_MIN,
    HEADER_NBYTES_MAX,
    MANIFEST_MARKS_MAX,
    MANIFEST_NBYTES_MAX,
)
from sllm_vllm.errors import CheckpointInvalid

FORMAT_NAME: Literal["sllm-checkpoint"] = "sllm-checkpoint"
FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
PARTITION_DIR = "partitions"
DATA_ALIGNMENT = 4096
"""Partition data starts at a multiple of this many bytes, so that every chunk can be read with O_DIRECT."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEX64 = re.compile(r"[0-9a-f]{16}")
TENSOR_ALIGNMENT = 256
"""Tensors whose size is not a multiple of this come after all others, so that every other one starts on a multiple."""

_MARKS = (b"{", b"[", b",", b":")
_METADATA_NAME = "__metadata__"  # reserved by safetensors
_MEND = "convert the model again"

Name = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class _ManifestRecord(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class SourceFileRecord(_ManifestRecord):
    """A source file of the weights. ``digest`` is the algorithm and the content's hash: ``xxh3:…``, ``sha256:…``."""

    name: Name
    nbytes: Count
    digest: Annotated[str, Field(max_length=128)]


class Source(_ManifestRecord):
    """Where the weights came from. ``fingerprint`` identifies the content of all ``files`` and is the same everywhere.

    ``revision`` is the commit of a model from the Hub. Checkpoints written by earlier versions list no files.
    """

    model: str
    revision: str | None = None
    fingerprint: str
    files: Annotated[list[SourceFileRecord], Field(max_length=100_000)] = []


class Layout(_ManifestRecord):
    """Everything that affects the contents of parameters. Two loads share a checkpoint only if all fields are equal."""

    model_class: str
    dtype: str
    quantization: str | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    expert_parallel_size: Annotated[int, Field(ge=1)] = 1
    num_partitions: Annotated[int, Field(ge=1, le=99_999)] = 1
    device_type: str
    vllm_version: str
    config_digest: str
    """Digest of all other settings in vLLM's and the model's configuration that affect the module."""


class TensorRecord(_ManifestRecord):
    """One stored tensor: ``nbytes`` bytes at ``offset`` in the partition's data, row-major. ``aliases`` share them."""

    name: Name
    dtype: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]
    shape: Annotated[list[Count], Field(max_length=64), FailFast()]
    offset: Count
    nbytes: Count
    aliases: Annotated[list[Name], FailFast()] = []

    @property
    def end(self) -> int:
        """Offset of the first byte after the tensor, counted like ``offset``."""
        return self.offset + self.nbytes

    @property
    def item_nbytes(self) -> int:
        """Bytes per element; 1 for an empty tensor of a dtype that safetensors lacks."""
        if self.dtype in DTYPE_CODES:
            return DTYPE_CODES[self.dtype][1]
        return self.nbytes // numel if (numel := math.prod(self.shape)) else 1

    @property
    def is_in_tail(self) -> bool:
        """Whether it belongs to the tail: its size is zero or not a multiple of ``TENSOR_ALIGNMENT``."""
        return self.nbytes == 0 or self.nbytes % TENSOR_ALIGNMENT != 0

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.name == _METADATA_NAME:
            raise ValueError(f"a tensor can't be named {self.name!r}, which safetensors keeps for itself")
        if math.prod(self.shape) * self.item_nbytes != self.nbytes or not 1 <= self.item_nbytes <= ITEM_NBYTES_MAX:
            kind = f"{self.dtype} {reprlib.repr(self.shape)}"
            raise ValueError(f"tensor {self.name!r}: {kind} does not take {self.nbytes} bytes")
        return self


class Partition(_ManifestRecord):
    """One rank's data file: a safetensors header of ``header_nbytes``, then data in chunks of ``chunk_nbytes``."""

    rank: Count
    path: str
    nbytes: Count
    header_nbytes: Annotated[int, Field(ge=DATA_ALIGNMENT, le=HEADER_NBYTES_MAX + 8)]
    header_checksum: str
    tensors: Annotated[list[TensorRecord], FailFast()]
    chunks: Annotated[list[str], FailFast()]
    """xxh3-64 of each chunk, as 16 hexadecimal digits."""

    @property
    def data_nbytes(self) -> int:
        """Bytes after the header."""
        return self.nbytes - self.header_nbytes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path != partition_path(self.rank):
            raise ValueError(
                f"path {self.path!r} is refused: partition {self.rank} lies at {partition_path(self.rank)!r}"
            )
        if self.header_nbytes % DATA_ALIGNMENT:
            raise ValueError(f"{self.path}: its data starts at {self.header_nbytes}, no multiple of {DATA_ALIGNMENT}")
        self._check_tensors()
        if not all(_HEX64.fullmatch(text) for text in (self.header_checksum, *self.chunks)):
            raise ValueError(f"{self.path}: a checksum is not 16 hexadecimal digits")
        return self

    def _check_tensors(self) -> None:
        end, names, width_max = 0, set[str](), None
        for tensor in self.tensors:
            if tensor.offset != end:
                raise ValueError(
                    f"{self.path}: tensor {tensor.name!r} starts at {tensor.offset}, the last ended at {end}"
                )
            end = tensor.end
            if tensor.nbytes and (tensor.is_in_tail or width_max is not None):
                if not tensor.is_in_tail or tensor.item_nbytes > (width_max or ITEM_NBYTES_MAX):
                    raise ValueError(f"{self.path}: tensor {tensor.name!r} may not lie behind smaller or narrower ones")
                width_max = tensor.item_nbytes
            for name in (tensor.name, *tensor.aliases):
                if name in names:
                    raise ValueError(f"{self.path}: tensor {name!r} is there twice")
                names.add(name)
        if end != self.data_nbytes:
            raise ValueError(f"{self.path}: tensors end at {end} of {self.data_nbytes} data bytes")


class Manifest(_ManifestRecord):
    """The validated description of a whole checkpoint."""

    format: Literal["sllm-checkpoint"] = FORMAT_NAME
    version: Literal[1] = FORMAT_VERSION
    created_by: str
    source: Source
    layout: Layout
    chunk_nbytes: Annotated[int, Field(ge=CHUNK_NBYTES_MIN, le=CHUNK_NBYTES_MAX, multiple_of=DATA_ALIGNMENT)]
    partitions: Annotated[list[Partition], FailFast()]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        ranks = [partition.rank for partition in self.partitions]
        if ranks != list(range(self.layout.num_partitions)):
            raise ValueError(f"partitions of ranks {ranks[:8]}, but the layout has {self.layout.num_partitions}")
        for partition in self.partitions:
            if len(partition.chunks) != num_chunks(partition.data_nbytes, self.chunk_nbytes):
                raise ValueError(
                    f"{partition.path}: {len(partition.chunks)} checksums do not fit {partition.nbytes} bytes"
                )
        return self

    @property
    def nbytes(self) -> int:
        """Total size of all partitions."""
        return sum(partition.nbytes for partition in self.partitions)


def partition_path(rank: int) -> str:
    """Return the path of a rank's partition inside the checkpoint."""
    return f"{PARTITION_DIR}/rank-{rank:05d}.safetensors"


def num_chunks(data_nbytes: int, chunk_nbytes: int) -> int:
    """Return how many chunks hold ``data_nbytes`` bytes; the last chunk may be short."""
    return -(-data_nbytes // chunk_nbytes)


def num_marks(raw: bytes) -> int:
    """Count opening brackets and braces, commas and colons in a JSON text: an upper bound on the values inside it."""
    return sum(map(raw.count, _MARKS))


def parse_json(raw: bytes, path: str, what: str) -> dict[str, Any]:
    """Parse a UTF-8 JSON object with unique keys and at most ``MANIFEST_MARKS_MAX`` marks (see ``num_marks``).

    Raises:
        CheckpointInvalid: ``raw`` is anything else.
    """
    if num_marks(raw) > MANIFEST_MARKS_MAX:  # checked before parsing: 3 bytes of JSON can take 100 bytes of memory
        raise CheckpointInvalid(path, f"the {what} holds too many values (limit: {MANIFEST_MARKS_MAX})", _MEND)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            last = {key: i for i, (key, _) in enumerate(pairs)}
            twice = next(key for i, (key, _) in enumerate(pairs) if last[key] != i)
            raise ValueError(f"key {twice!r} is there twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # raises if a surrogate has no partner
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(path, f"the {what} is not valid JSON ({_one_line(error)})", _MEND) from None
    if not isinstance(value, dict):
        raise CheckpointInvalid(path, f"the {what} is not a JSON object", _MEND)
    return value


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Validate a manifest. ``path`` is for messages only.

    Raises:
        CheckpointInvalid: the manifest violates FORMAT.md; the message says where.
    """
    if len(raw) > MANIFEST_NBYTES_MAX:
        raise CheckpointInvalid(path, f"{len(raw)} bytes is too large for a manifest", _MEND)
    value = parse_json(raw, path, "manifest")
    if value.get("format") != FORMAT_NAME:
        found = reprlib.repr(value.get("format"))
        raise CheckpointInvalid(path, f"format is {found}, not {FORMAT_NAME!r}", _MEND)
    if value.get("version") != FORMAT_VERSION or type(value["version"]) is not int:
        version = reprlib.repr(value.get("version"))
        raise CheckpointInvalid(path, f"format version {version} is unknown", f"install a newer sllm-vllm or {_MEND}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise CheckpointInvalid(path, first_problem(error), _MEND) from None


def first_problem(error: ValidationError) -> str:
    """Describe the first validation error of a record on one line."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{_one_line(message)}"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
