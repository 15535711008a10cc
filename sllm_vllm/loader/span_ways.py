"""Ways to bring spans from the store's pool to a sink: mapping, copying, or page-locking."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy
import torch

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import ChunkSink, HostSink
from sllm_vllm.loader.span_lease import Span, SpanLease

# Copies from the store's pool to a CUDA device without a buffer in between, by page-locking the slots themselves.


_READ_ONLY = 0x08
_DEFAULT = 0x00

logger = logging.getLogger(f"vllm.{__name__}")


class RegisterWay:
    """Implements ``SpanWay``. Each slot is registered with CUDA when it is first used, until the load ends.

    If the driver refuses to register a slot, it is copied from nevertheless, slowly, as from any pageable memory.
    """

    def __init__(
        self, lease: SpanLease, plan: LoadPlan, sink: CudaSink, *, device: torch.device, counter: HopCounter
    ) -> None:
        self._lease = lease
        self._plan = plan
        self._sink = sink
        self._device = device
        self._counter = counter
        self._registered: dict[int, int] = {}  # slot -> address
        self._flags: int | None = _READ_ONLY
        lease.view_pool()

    def map(self, span: Span) -> bool:
        """See ``SpanWay``."""
        return False

    def populate(self, span: Span) -> None:
        """See ``SpanWay``."""

    def copy(self, span: Span, on_chunk: Callable[[int], None]) -> None:
        """See ``SpanWay``: copies asynchronously, then waits for the copies; two threads keep the device busy."""
        with torch.cuda.device(self._device):
            host = torch.from_numpy(self._lease.slot_bytes(span))
            start = time.perf_counter()
            self._register(span.slot, host)
            copied = torch.cuda.Event()
            for number, chunk in enumerate(span.chunks):
                self._sink.copy_from(chunk, host[number * self._plan.chunk_nbytes :], copied)
                on_chunk(chunk)
            copied.synchronize()
        nbytes = sum(self._plan.chunk_size(chunk) for chunk in span.chunks)
        self._counter.add("copy", nbytes, start_s=start, end_s=time.perf_counter())

    def close(self) -> None:
        """See ``SpanWay``."""
        with torch.cuda.device(self._device):
            for address in self._registered.values():
                torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()

    def _register(self, slot: int, host: torch.Tensor) -> None:
        """Page-lock a slot's memory. A slot holds one span at a time, so no two threads register the same slot."""
        while slot not in self._registered and self._flags is not None:
            flags = self._flags
            result = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), flags))
            if result == 0:
                self._registered[slot] = host.data_ptr()
            elif flags == _READ_ONLY:
                self._flags = _DEFAULT  # this device does not support read-only registration
            else:
                self._flags = None
                logger.warning("event=not_registered error=%d reason='the driver refuses the pool's memory'", result)


class SpanWay(Protocol):
    """Brings spans to a sink. ``map`` and ``close`` are called by one thread at a time, other methods by several."""

    def map(self, span: Span) -> bool:
        """Map the slot into the sink's memory; the span is released once it is no longer in use there.

        Returns:
            False if the span has to be copied instead.
        """
        ...

    def populate(self, span: Span) -> None:
        """Map a mapped span's pages ahead of use, so that its first use is fast."""
        ...

    def copy(self, span: Span, on_chunk: Callable[[int], None]) -> None:
        """Copy a span; return once its slot may be released.

        Args:
            on_chunk: called with each chunk once it was handed to the sink.

        Raises:
            InterruptedError: the sink was stopped.
        """
        ...

    def close(self) -> None:
        """Clean up, and free what was never attached. Called once no tensor will be attached and no copy is running."""
        ...


class CopyWay:
    """Copies chunks into the sink's own buffers: private memory, or a ring of page-locked buffers."""

    def __init__(self, lease: SpanLease, plan: LoadPlan, sink: ChunkSink, *, counter: HopCounter) -> None:
        self.lease = lease
        self.plan = plan
        self.counter = counter
        self._sink = sink
        lease.view_pool()

    def map(self, span: Span) -> bool:
        """See ``SpanWay``."""
        return False

    def populate(self, span: Span) -> None:
        """See ``SpanWay``."""

    def copy(self, span: Span, on_chunk: Callable[[int], None]) -> None:
        """See ``SpanWay``."""
        slot = self.lease.slot_bytes(span)
        for number, chunk in enumerate(span.chunks):
            offset, nbytes = number * self.plan.chunk_nbytes, self.plan.chunk_size(chunk)
            buffer = self._sink.buffer(chunk)
            start = time.perf_counter()
            numpy.frombuffer(buffer, dtype=numpy.uint8)[:nbytes] = slot[offset : offset + nbytes]
            self.counter.add("copy_pool", nbytes, start_s=start, end_s=time.perf_counter())
            self._sink.deliver(chunk, buffer, nbytes)
            on_chunk(chunk)

    def close(self) -> None:
        """See ``SpanWay``."""


class MapWay(CopyWay):
    """Maps spans that may be kept into a ``HostSink``'s memory; other spans are copied there."""

    def __init__(self, lease: SpanLease, plan: LoadPlan, sink: HostSink, *, counter: HopCounter) -> None:
        super().__init__(lease, plan, sink, counter=counter)
        self._memory = sink.memory
        self._memory.accept_spans(lease.span_nbytes, lease.release)

    def map(self, span: Span) -> bool:
        """See ``SpanWay``."""
        start = time.perf_counter()
        offset = self.lease.slot_offset(span)
        if not span.keep or not self._memory.map_span(span.index, fd=self.lease.pool_fd, file_offset=offset):
            return False
        nbytes = sum(self.plan.chunk_size(chunk) for chunk in span.chunks)
        self.counter.add("map", nbytes, start_s=start, end_s=time.perf_counter())
        return True

    def populate(self, span: Span) -> None:
        """See ``SpanWay``."""
        self._memory.populate(span.index)

    def close(self) -> None:
        """See ``SpanWay``."""
        self._memory.settle_rest()
