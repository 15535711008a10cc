"""Ways to bring spans from the store's pool to a sink: mapping or copying. ``cuda_pool_sink.py`` has another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import ChunkSink, HostSink
from sllm_vllm.loader.span_lease import Span, SpanLease


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
