"""``CudaSink``: asynchronous copies from page-locked memory into the parameters that vLLM allocated on the device.

Readers fill a small ring of page-locked buffers. The sink copies each full one piece by piece on its own stream; the
buffer is free again once its copies are done. Parameters keep their addresses, as CUDA graphs and sleep mode need.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import Target, byte_view, copy_bits
from sllm_vllm.units import round_up


@dataclass(slots=True)
class _Slot:
    """A page-locked buffer, and the event recorded after the last copy from it."""

    host: torch.Tensor
    view: memoryview
    copied: torch.cuda.Event


class CudaSink:
    """Copies chunks to a CUDA device once it is bound; ``finish`` takes the targets' tensors.

    Args:
        num_slots: page-locked buffers of one chunk each; at least two are needed for copies and reads to overlap.
    """

    def __init__(self, plan: LoadPlan, device: torch.device, *, num_slots: int, counter: HopCounter) -> None:
        self._plan = plan
        self._targets: Sequence[Target] = ()
        self._bound = threading.Event()
        self._device = device
        self._counter = counter
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._used: dict[int, _Slot] = {}
        self._gathered: dict[int, torch.Tensor] = {}
        for _ in range(num_slots):
            self._free.put(self._new_slot())

    def bind(self, targets: Sequence[Target]) -> None:
        """See ``ChunkSink``."""
        self._targets = targets
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # vLLM may still be initialising them
        self._bound.set()

    def buffer(self, chunk: int) -> memoryview:
        """See ``ChunkSink``."""
        slot = self._free.get()
        if slot is None:
            self._free.put(None)
        self._check_not_stopped()
        assert slot is not None
        slot.copied.synchronize()
        self._used[chunk] = slot
        return slot.view

    def deliver(self, chunk: int, buffer: memoryview, nbytes: int) -> None:
        """See ``ChunkSink``."""
        slot = self._used.pop(chunk)
        start = time.perf_counter()
        self.copy_from(chunk, slot.host, slot.copied)
        self._free.put(slot)
        self._counter.add("copy", nbytes, start_s=start, end_s=time.perf_counter())

    def copy_from(self, chunk: int, host: torch.Tensor, copied: torch.cuda.Event) -> None:
        """Begin to copy a chunk from ``host``, whose bytes must not change until the event ``copied`` has occurred.

        Waits until the sink is bound.

        Raises:
            InterruptedError: the sink was stopped.
        """
        self._bound.wait()
        self._check_not_stopped()
        with self._lock, torch.cuda.stream(self._stream):
            for copy in self._plan.copies[chunk]:
                piece = host[copy.chunk_offset : copy.chunk_offset + copy.nbytes]
                for target in self._byte_targets(copy.tensor):
                    target[copy.tensor_offset : copy.tensor_offset + copy.nbytes].copy_(piece, non_blocking=True)
            copied.record(self._stream)

    def attach(self, tensor: int) -> None:
        """See ``ChunkSink``: nothing to do, parameters can't be used before ``finish``."""

    def finish(self) -> None:
        """See ``ChunkSink``: waits for every copy."""
        with torch.cuda.stream(self._stream):
            for index, gathered in self._gathered.items():
                for live in self._targets[index].tensors:
                    if not live.is_contiguous():
                        copy_bits(gathered.view(live.dtype).view(live.shape), live.data)
        self._stream.synchronize()
        self._gathered.clear()
        for target in self._targets:
            target.take()

    def stop(self) -> None:
        """See ``ChunkSink``."""
        self._stopped.set()
        self._bound.set()
        self._free.put(None)

    def _check_not_stopped(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("the load was stopped")

    def _byte_targets(self, tensor: int) -> list[torch.Tensor]:
        """Where a record's bytes are copied to: its contiguous live tensors, and, if it has others, a buffer from which
        ``finish`` copies to those."""
        live = self._targets[tensor].tensors
        contiguous = [byte_view(t.data) for t in live if t.is_contiguous()]
        if len(contiguous) == len(live):
            return contiguous
        if tensor not in self._gathered:
            nbytes = self._plan.partition.tensors[tensor].nbytes
            self._gathered[tensor] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return [*contiguous, self._gathered[tensor]]

    def _new_slot(self) -> _Slot:
        nbytes = round_up(self._plan.chunk_nbytes, mmap.PAGESIZE)
        host = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, pin_memory=True)
        host = host[-host.data_ptr() % mmap.PAGESIZE :][:nbytes]
        return _Slot(host, host.numpy().data, torch.cuda.Event())
