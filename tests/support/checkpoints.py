"""Checkpoints for tests, torch-free: tensors of random bytes, keys, and what is left on disk afterwards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.checkpoint.core.layout import TensorSpec
from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, Layout, Source
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.checkpoint.writer import TensorData, write_partition
from sllm_vllm.errors import SllmError

CHUNK_NBYTES = 8192
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor of given bytes. Implements the writer's `TensorData`."""

    spec: TensorSpec
    data: bytes

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        view = memoryview(self.data)
        for start in range(0, len(view), nbytes_max):
            yield view[start : start + nbytes_max]


def blob(
    name: str,
    *shape: int,
    dtype: str = "uint8",
    item_nbytes: int = 1,
    aliases: tuple[str, ...] = (),
) -> Blob:
    """A tensor whose bytes depend on its name alone."""
    nbytes = math.prod(shape) * item_nbytes
    return Blob(TensorSpec(name, dtype, shape, item_nbytes, nbytes, aliases), random.Random(name).randbytes(nbytes))


TENSORS: tuple[Blob, ...] = (
    blob("embed", 3, CHUNK_NBYTES, aliases=("lm_head",)),
    blob("scale", 3, dtype="float32", item_nbytes=4),
    blob("exact", CHUNK_NBYTES),
    blob("bias", 5, dtype="bfloat16", item_nbytes=2),
    blob("small", 512),
    blob("nothing", 0, 7),
)
"""Larger than a chunk, exactly one, smaller; a tail; a tied one; one without elements."""


def make_key(num_partitions: int = 1, **source: Any) -> CheckpointKey:
    """A key; `source` replaces fields of its source."""
    layout = Layout(
        model_class="Llama",
        dtype="bfloat16",
        num_partitions=num_partitions,
        device_type="cpu",
        vllm_version="0.1",
        config_digest="00",
    )
    return CheckpointKey(Source(**({"model": "org/tiny", "fingerprint": "f0"} | source)), layout)


def write_rank(
    root: Path,
    key: CheckpointKey,
    rank: int = 0,
    *,
    tensors: Sequence[TensorData] = TENSORS,
    chunk_nbytes: int = CHUNK_NBYTES,
    publishes: bool = True,
) -> bool:
    """Write a rank as the loader does, and publish if it is the last one. Returns whether it is published now."""
    staging = CheckpointRepository(root).stage(key, chunk_nbytes)
    with staging.writer(rank) as needed:
        if needed:
            staging.commit(write_partition(staging.path, rank, tensors, chunk_nbytes=chunk_nbytes))
    return staging.publish() if publishes else False


def make_checkpoint(
    root: Path, *, key: CheckpointKey | None = None, tensors: Sequence[TensorData] = TENSORS
) -> Checkpoint:
    """A published checkpoint, each of its ranks with the same tensors."""
    key = key or make_key()
    for rank in range(key.layout.num_partitions):
        write_rank(root, key, rank, tensors=tensors)
    return CheckpointRepository(root).find(key)


def manifest_value(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its manifest as plain JSON."""
    value: dict[str, Any] = json.loads((checkpoint.path / MANIFEST_NAME).read_bytes())
    return value


def with_manifest(checkpoint: Checkpoint, value: object) -> Checkpoint:
    """The same checkpoint with another manifest, opened anew."""
    (checkpoint.path / MANIFEST_NAME).write_text(json.dumps(value))
    return open_checkpoint(checkpoint.path)


def files_below(root: Path) -> set[str]:
    """Every file and link below `root`, by relative path; no directories."""
    return {os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names}


def files_but_locks(root: Path) -> set[str]:
    """Every file below `root` that is no lock."""
    return {name for name in files_below(root) if not name.startswith(".locks/")}


def files_of(key: CheckpointKey) -> set[str]:
    """All files that a published checkpoint consists of, relative to its root."""
    partitions = {f"partitions/rank-{rank:05d}.safetensors" for rank in range(key.layout.num_partitions)}
    return {f"{key.name}/{name}" for name in {MANIFEST_NAME, *partitions}}


def assert_says_where_and_mend(error: SllmError, place: str) -> None:
    """A message is one printable line that names the file and ends with a mend."""
    text = str(error)
    assert text.isprintable()
    assert place in text
    assert len(text.rpartition("; ")[2]) > 5


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Let permission bits bind, which they do not for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
