"""Checkpoints for the store's tests: large enough to have many spans, and quick to make."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.checkpoint.core.layout import TensorSpec
from sllm_vllm.checkpoint.core.manifest import Layout, Source
from sllm_vllm.checkpoint.reader import Checkpoint, RankPartition, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.checkpoint.writer import write_partition
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Leased
from sllm_vllm.units import MIB

TENSOR_NBYTES = 3 * MIB // 2


@dataclass(frozen=True, slots=True)
class Noise:
    """A tensor whose bytes depend on its name alone. Implements the writer's ``TensorData``."""

    spec: TensorSpec

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        data = memoryview(random.Random(self.spec.name).randbytes(self.spec.nbytes))
        for start in range(0, len(data), nbytes_max):
            yield data[start : start + nbytes_max]


def noise(name: str, nbytes: int) -> Noise:
    return Noise(TensorSpec(name, "uint8", (nbytes,), 1, nbytes, ()))


def make_checkpoint(
    store_dir: Path, model: str, *, nbytes: int = 16 * MIB, chunk_nbytes: int = MIB, ranks: int = 1
) -> Checkpoint:
    """Publish a checkpoint of about ``nbytes`` a rank whose bytes depend on ``model`` and ``ranks``."""
    layout = Layout(
        model_class="Noise",
        dtype="uint8",
        tensor_parallel_size=ranks,
        num_partitions=ranks,
        device_type="cpu",
        vllm_version="none",
        config_digest="",
    )
    key = CheckpointKey(Source(model=model, fingerprint=model), layout)
    staging = CheckpointRepository(store_dir).stage(key, chunk_nbytes)
    for rank in range(ranks):
        count = max(1, nbytes // TENSOR_NBYTES)
        tensors = [noise(f"{model}.{rank}/{ranks}.{index}", TENSOR_NBYTES) for index in range(count)]
        tensors.append(noise(f"{model}.{rank}/{ranks}.scale", 7))
        with staging.writer(rank) as needed:
            if needed:
                staging.commit(write_partition(staging.path, rank, tensors, chunk_nbytes=chunk_nbytes))
    assert staging.publish()
    return open_checkpoint(staging.target)


def data_of(partition: RankPartition) -> bytes:
    """A partition's data as it lies on disk."""
    return partition.path.read_bytes()[partition.record.header_nbytes :]


def lease_of(client: StoreClient, checkpoint: Checkpoint, *, rank: int = 0, hold: bool = False) -> Leased:
    """Lease a rank's partition."""
    digest = checkpoint.partition(rank).content_digest
    return client.lease(checkpoint.path.name, rank, digest, hold=hold)


def load_through(client: StoreClient, checkpoint: Checkpoint, *, rank: int = 0) -> bytes:
    """Take a whole partition through the store, as a client that copies does."""
    partition = checkpoint.partition(rank)
    leased = lease_of(client, checkpoint, rank=rank)
    span_nbytes = leased.chunks_per_span * partition.manifest.chunk_nbytes
    data, left = bytearray(partition.record.data_nbytes), leased.num_spans
    while left:
        for span, slot, _ in client.next_given(60.0).spans:
            copy_span(client, slot, data, start=span * span_nbytes, nbytes=span_nbytes)
            client.release(leased.token, (span,))
            left -= 1
    return bytes(data)


def copy_span(client: StoreClient, slot: int, data: bytearray, *, start: int, nbytes: int) -> None:
    """Copy a slot's bytes to where its span belongs."""
    nbytes = min(nbytes, len(data) - start)
    data[start : start + nbytes] = read_slot(client, slot, nbytes)


def read_slot(client: StoreClient, slot: int, nbytes: int) -> bytes:
    """A slot's bytes, as any client may read them."""
    return os.pread(client.pool_fd, nbytes, slot * client.welcome.slot_nbytes)
