"""Copies from the store's pool to a CUDA device with no buffer between: the slots themselves are page-locked here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.cuda_sink import CudaSink
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.span_lease import Span, SpanLease

_READ_ONLY = 0x08
_DEFAULT = 0x00

logger = logging.getLogger(f"vllm.{__name__}")


class RegisterWay:
    """Implements ``SpanWay``. Each slot is registered when it comes first, and stays so until the load ends.

    A slot that the driver will not register is copied from all the same: slowly, as from any pageable memory.
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
        """See ``SpanWay``: on the device's own time; two threads keep it busy."""
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
        """Page-lock a slot's memory. Slots are held by one span at a time, so no two threads register the same."""
        while slot not in self._registered and self._flags is not None:
            flags = self._flags
            result = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), flags))
            if result == 0:
                self._registered[slot] = host.data_ptr()
            elif flags == _READ_ONLY:
                self._flags = _DEFAULT  # the device can't read memory that the CPU may not write
            else:
                self._flags = None
                logger.warning("event=not_registered error=%d reason='the driver refuses the pool's memory'", result)
