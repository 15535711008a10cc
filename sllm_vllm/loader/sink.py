"""Sinks take the chunks of a load. ``HostSink`` keeps them in this process's memory and points parameters at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.partition_memory import PartitionMemory

REBIND_ALIGNMENT = 64
"""Kernels may expect the alignment of a cache line. A tensor with less, which is always a small one, is copied."""


def typed_view(data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """View a contiguous uint8 tensor with another dtype and shape; shares memory."""
    return data.view(dtype).view(list(shape))


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as its bytes, a one-dimensional uint8 tensor; shares memory."""
    return tensor.reshape(-1).view(torch.uint8)


def copy_bits(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy between tensors of equal dtype and shape, bit for bit, even for dtypes that torch can't convert."""
    if source.is_contiguous() and target.is_contiguous():
        byte_view(target).copy_(byte_view(source))
    else:
        target.copy_(source)


class ChunkSink(Protocol):
    """Takes the chunks of one partition. ``buffer`` and ``deliver`` are called by readers, the rest by the consumer."""

    def buffer(self, chunk: int) -> memoryview:
        """Page-aligned memory to read a chunk into; waits until some is free.

        Raises:
            InterruptedError: the sink was stopped.
        """
        ...

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        """Take the chunk that was read into ``buffer``."""
        ...

    def bind(self, targets: Sequence[Target]) -> None:
        """Set the targets, one per record. Called once; reading may have begun before."""
        ...

    def attach(self, tensor: int) -> None:
        """Fill a tensor's parameters, once all its chunks were delivered. Safe to call twice."""
        ...

    def finish(self) -> None:
        """Return once every parameter can be used."""
        ...

    def stop(self) -> None:
        """Wake the threads that wait for a buffer; no more chunks will be delivered."""
        ...


class Target(Protocol):
    """The live tensors that one stored tensor fills; several if weights are tied."""

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Distinct objects; empty once taken."""
        ...

    @property
    def rebindable(self) -> bool:
        """Whether their ``.data`` may be replaced, because nothing else uses the same memory."""
        ...

    def take(self) -> Sequence[torch.Tensor]:
        """Return the tensors and forget them, so that a parameter which vLLM drops is not kept alive from here."""
        ...


class HostSink:
    """Memory of a partition's size, filled chunk by chunk, or mapped span by span from the store's pool.

    It is in huge pages where the system has them. A tensor's memory is returned to the system as soon as nothing refers
    to the tensor, so that packing one module after another needs memory for one copy of the model, not two.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._targets: Sequence[Target] = ()
        self.memory = PartitionMemory(plan)

    def buffer(self, chunk: int) -> memoryview:
        """See ``ChunkSink``: the chunk's place in the partition's memory, which is always free."""
        return self.memory.chunk(chunk)

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        """See ``ChunkSink``: nothing to do, the chunk was read into its final place."""

    def bind(self, targets: Sequence[Target]) -> None:
        """See ``ChunkSink``."""
        self._targets = targets

    def attach(self, tensor: int) -> None:
        """See ``ChunkSink``."""
        target, record = self._targets[tensor], self._plan.partition.tensors[tensor]
        data, tensors = self.memory.claim(tensor), target.take()
        if data is None or not tensors:
            return
        source = typed_view(torch.from_numpy(data), tensors[0].dtype, record.shape)
        rebind = target.rebindable and record.offset % REBIND_ALIGNMENT == 0
        for live in tensors:
            if rebind:
                live.data = source
            else:
                copy_bits(source, live.data)

    def finish(self) -> None:
        """See ``ChunkSink``: nothing to wait for."""

    def stop(self) -> None:
        """See ``ChunkSink``: no thread ever waits for a buffer."""
