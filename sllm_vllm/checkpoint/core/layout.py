"""Where each tensor goes in a partition. Pure.

Tensors keep the order in which they are given (execution order), so that a module's bytes lie together and arrive
together. Those whose size is no multiple of 256 bytes go last, the widest elements first: every large tensor starts on
a 256-byte boundary and every small one on a multiple of its element size, without the holes that safetensors forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_vllm.checkpoint.core.manifest import TENSOR_ALIGNMENT, TensorRecord, num_chunks


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be stored; ``aliases`` are other names of the same bytes (tied weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    item_nbytes: int
    nbytes: int
    aliases: tuple[str, ...] = ()


def plan_records(specs: Sequence[TensorSpec]) -> list[TensorRecord]:
    """Give every tensor its offset. The result is in file order and has no holes."""
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
    """Offset from which only small, unaligned tensors follow. They are read first: every module may need one."""
    return next((record.offset for record in records if record.is_in_tail), records[-1].end if records else 0)


def _in_body(nbytes: int) -> bool:
    return nbytes > 0 and nbytes % TENSOR_ALIGNMENT == 0


def load_order(tensors: Sequence[TensorRecord], chunk_nbytes: int) -> tuple[int, ...]:
    """Chunks in the order in which a load wants them.

    First those with the small unaligned tensors, as any module may need one of them; then the others in file order.
    """
    count = num_chunks(tensors[-1].end if tensors else 0, chunk_nbytes)
    first_tail = tail_offset(tensors) // chunk_nbytes
    return (*range(first_tail, count), *range(min(first_tail, count)))
