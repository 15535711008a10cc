"""Where chunks go. ``HostSink`` is the process's own memory: parameters are rebound to it, nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.partition_memory import PartitionMemory

REBIND_ALIGNMENT = 64
"""Kernels may expect a cache line's alignment; a tensor that has less (a small one, always) is copied instead."""


def typed_view(data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """See a contiguous uint8 tensor as another dtype and shape. Shares memory."""
    return data.view(dtype).view(list(shape))


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """See a contiguous tensor as its bytes, uint8 of one dimension. Shares memory."""
    return tensor.reshape(-1).view(torch.uint8)


def copy_bits(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy between tensors of equal dtype and shape, bit for bit, also for dtypes that torch can't convert."""
    if source.is_contiguous() and target.is_contiguous():
        byte_view(target).copy_(byte_view(source))
    else:
        target.copy_(source)


class ChunkSink(Protocol):
    """Takes the chunks of one partition. ``buffer`` and ``deliver`` are called by readers, the rest by the consumer."""

    def buffer(self, chunk: int) -> memoryview:
        """Page-aligned memory to read a chunk into; waits until some is free.

        Raises:
            InterruptedError: the sink was stopped meanwhile.
        """
        ...

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        """The buffer now holds the chunk."""
        ...

    def bind(self, targets: Sequence[Target]) -> None:
        """Say where the tensors go, one target a record; reading may have begun before. Called once."""
        ...

    def attach(self, tensor: int) -> None:
        """All chunks of a tensor were delivered: let its parameters hold it. Safe to call twice."""
        ...

    def finish(self) -> None:
        """Return when every parameter can be used."""
        ...

    def stop(self) -> None:
        """Wake whoever waits for a buffer; nothing more will come."""
        ...


class Target(Protocol):
    """The live tensors that one stored tensor goes to (tied weights: several)."""

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Distinct objects; empty once taken."""
        ...

    @property
    def rebindable(self) -> bool:
        """Whether their ``.data`` may be replaced: nothing else looks at the same memory."""
        ...

    def take(self) -> Sequence[torch.Tensor]:
        """The tensors, leaving none: a parameter that vLLM drops must not be kept alive from here."""
        ...


class HostSink:
    """Memory of a partition's size, in huge pages where the system has them, filled chunk by chunk, or mapped span by
    span from the store's pool.

    A tensor's part of the memory goes back to the system as soon as nothing refers to the tensor, so that packing a
    module after the other needs one copy of the model, not two.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._targets: Sequence[Target] = ()
        self.memory = PartitionMemory(plan)

    def buffer(self, chunk: int) -> memoryview:
        """See ``ChunkSink``: the chunk's own place in memory, always free."""
        return self.memory.chunk(chunk)

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        """See ``ChunkSink``: it lies where it belongs already."""

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
        """See ``ChunkSink``: nothing is under way."""

    def stop(self) -> None:
        """See ``ChunkSink``: nobody ever waits."""
