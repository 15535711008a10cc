"""Decides where each tensor goes in a partition. Pure.

Tensors keep the order in which they are passed in (execution order), so that the bytes of one module are adjacent and
arrive together. Tensors whose size is not a multiple of 256 bytes go last, in the *tail*, widest elements first. Every
tensor before the tail then starts on a 256-byte boundary, and every tensor in the tail on a multiple of its element
size, without gaps between tensors, which safetensors forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_vllm.checkpoint.core.manifest import TENSOR_ALIGNMENT, TensorRecord, num_chunks


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to store. ``aliases`` are other names for the same bytes (tied weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    item_nbytes: int
    nbytes: int
    aliases: tuple[str, ...] = ()


def plan_records(specs: Sequence[TensorSpec]) -> list[TensorRecord]:
    """Assign an offset to every tensor. The records are in file order and leave no gaps."""
    body = [spec for spec in specs if _in_body(spec.nbytes)]
    tail = sorted((spec for spec in specs if not _in_body(spec.nbytes)), key=lambda spec: -spec.item_nbytes)
    records, offset = [], 0
    for spec in (*body, *tail):
        records.append(
            TensorRecord(
                name=spec.name,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                nbytes=spec.nbytes,
                aliases=list(spec.aliases),
            )
        )
        offset += spec.nbytes
    return records


def tail_offset(records: Sequence[TensorRecord]) -> int:
    """Return the offset at which the tail (small, unaligned tensors) starts."""
    return next((record.offset for record in records if record.is_in_tail), records[-1].end if records else 0)


def _in_body(nbytes: int) -> bool:
    return nbytes > 0 and nbytes % TENSOR_ALIGNMENT == 0


def load_order(tensors: Sequence[TensorRecord], chunk_nbytes: int) -> tuple[int, ...]:
    """Return the indices of all chunks in the order in which a load needs them.

    Chunks of the tail come first, because any module may need one of its small tensors; the others follow in file
    order.
    """
    count = num_chunks(tensors[-1].end if tensors else 0, chunk_nbytes)
    first_tail = tail_offset(tensors) // chunk_nbytes
    return (*range(first_tail, count), *range(min(first_tail, count)))
