"""The load plan: the order in which chunks are read, and the position at which each tensor is complete. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sllm_vllm.checkpoint.core.layout import load_order
from sllm_vllm.checkpoint.core.manifest import Partition, TensorRecord


@dataclass(frozen=True, slots=True)
class Copy:
    """``nbytes`` at ``chunk_offset`` of a chunk belong at ``tensor_offset`` of tensor number ``tensor``."""

    tensor: int
    chunk_offset: int
    tensor_offset: int
    nbytes: int


@dataclass(frozen=True)
class LoadPlan:
    """The plan for one partition. ``order`` holds chunk indices; a *position* is an index into ``order``."""

    partition: Partition
    chunk_nbytes: int

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Chunk indices in the order in which they are read; see ``load_order``."""
        return load_order(self.partition.tensors, self.chunk_nbytes)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {chunk: position for position, chunk in enumerate(self.order)}

    def ready_position(self, tensor: int) -> int:
        """Position of the chunk that completes a tensor; -1 if the tensor has no bytes."""
        return max((self._positions[chunk] for chunk in self._chunks_of(self.partition.tensors[tensor])), default=-1)

    def chunk_size(self, chunk: int) -> int:
        """Bytes of a chunk; the last one may be shorter than the others."""
        return min(self.chunk_nbytes, self.partition.data_nbytes - chunk * self.chunk_nbytes)

    @cached_property
    def copies(self) -> tuple[tuple[Copy, ...], ...]:
        """For each chunk, where its bytes go."""
        result: list[list[Copy]] = [[] for _ in self.order]
        for index, record in enumerate(self.partition.tensors):
            for chunk in self._chunks_of(record):
                start = max(record.offset, chunk * self.chunk_nbytes)
                end = min(record.end, (chunk + 1) * self.chunk_nbytes)
                result[chunk].append(
                    Copy(
                        tensor=index,
                        chunk_offset=start - chunk * self.chunk_nbytes,
                        tensor_offset=start - record.offset,
                        nbytes=end - start,
                    )
                )
        return tuple(tuple(copies) for copies in result)

    def _chunks_of(self, record: TensorRecord) -> range:
        if record.nbytes == 0:
            return range(0)
        return range(record.offset // self.chunk_nbytes, (record.end - 1) // self.chunk_nbytes + 1)
