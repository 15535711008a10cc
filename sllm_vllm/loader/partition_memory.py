"""One partition in this process's memory, as private pages or pages mapped from the store's pool, freed when unused.

Users of a tensor hold an array over its memory. When the array is collected, the tensor's memory is freed. A span
mapped from the pool is unmapped and released once none of its tensors are in use. Needs numpy alone.
"""

from __future__ import annotations

import collections
import mmap
import threading
import weakref
from collections.abc import Callable
from functools import cached_property, partial

from sllm_vllm.loader.address_space import AddressSpace, ByteArray
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.units import round_up

MAPPED_SPANS_MAX = 16_384
"""Linux allows a process 65,530 mappings by default; each span takes one, and at worst splits another in two."""


class Serial:
    """Runs calls one at a time, without ever waiting for a lock.

    Made for finalisers, which may run in any thread and at any line, even inside this class, and so must not wait for
    a lock. If a call is in progress, in this thread or another, the thread that runs it runs the new one afterwards.
    """

    def __init__(self) -> None:
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._busy = threading.Lock()

    def run(self, call: Callable[[], None]) -> None:
        """Run ``call`` now, or leave it to the thread that is running another call."""
        self._calls.append(call)
        while self._calls and self._busy.acquire(blocking=False):
            try:
                while self._calls:
                    self._calls.popleft()()
            finally:
                self._busy.release()


class PartitionMemory:
    """Memory of a partition's size, with the offsets of the partition's data.

    A tensor is *settled* when it is no longer in use. ``claim`` and ``settle_rest`` are called by the consumer, once
    the tensor's bytes have arrived; ``map_span`` before that, by the thread that receives spans.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._space = AddressSpace(plan.partition.data_nbytes)
        self._serial = Serial()
        self._claimed: set[int] = set()
        self._span_nbytes = 0
        self._num_users: dict[int, int] = {}  # by mapped span: how many of its tensors are not settled
        self._released: Callable[[int], None] = lambda span: None

    def chunk(self, chunk: int) -> memoryview:
        """The memory of a chunk, up to the end of its last page."""
        nbytes = round_up(self._plan.chunk_size(chunk), mmap.PAGESIZE)
        return self._space.array(chunk * self._plan.chunk_nbytes, nbytes).data

    def claim(self, tensor: int) -> ByteArray | None:
        """A tensor's bytes, whose memory is freed when the array is collected.

        None if the tensor was claimed before or has no bytes.
        """
        record = self._plan.partition.tensors[tensor]
        if tensor in self._claimed:
            return None
        self._claimed.add(tensor)
        if record.nbytes == 0:
            return None
        array = self._space.array(record.offset, record.nbytes)
        weakref.finalize(array, self._settle, tensor).atexit = False
        return array

    def settle_rest(self) -> None:
        """Settle the tensors that were never claimed; none may be claimed afterwards."""
        for tensor, record in enumerate(self._plan.partition.tensors):
            if tensor not in self._claimed and record.nbytes:
                self._claimed.add(tensor)
                self._settle(tensor)

    def accept_spans(self, span_nbytes: int, released: Callable[[int], None]) -> None:
        """Allow ``map_span`` from now on.

        Args:
            span_nbytes: bytes of a span.
            released: called with each mapped span once it is no longer in use: at most once a span, from any thread,
                possibly from a finaliser.
        """
        self._span_nbytes, self._released = span_nbytes, released

    def map_span(self, span: int, *, fd: int, file_offset: int) -> bool:
        """Map a file's bytes privately in place of a span; False if they have to be copied here instead."""
        start, nbytes = self._range_of(span)
        aligned = start % mmap.PAGESIZE == file_offset % mmap.PAGESIZE == 0
        if not aligned or len(self._num_users) >= MAPPED_SPANS_MAX:
            return False
        self._num_users[span] = self._users_of_spans[span]
        try:
            self._space.map_file(start, nbytes, fd=fd, file_offset=file_offset)
        except OSError:
            del self._num_users[span]
            return False
        return True

    def populate(self, span: int) -> None:
        """Map the pages of a span now, so that reading them causes no page faults. The span may be released already."""
        self._space.populate(*self._range_of(span))

    def _range_of(self, span: int) -> tuple[int, int]:
        start = span * self._span_nbytes
        nbytes = min(self._span_nbytes, self._plan.partition.data_nbytes - start)
        return start, round_up(nbytes, mmap.PAGESIZE)

    def _settle(self, tensor: int) -> None:
        record = self._plan.partition.tensors[tensor]
        start = round_up(record.offset, mmap.PAGESIZE)
        nbytes = record.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if nbytes > 0:
            self._space.discard(start, nbytes)
        if self._num_users:
            self._serial.run(partial(self._count_down, tensor))

    def _count_down(self, tensor: int) -> None:
        for span in self._spans_of(tensor):
            if span not in self._num_users:
                continue  # its bytes were copied
            self._num_users[span] -= 1
            if self._num_users[span] == 0:
                self._space.put_nothing(*self._range_of(span))
                del self._num_users[span]
                self._released(span)

    def _spans_of(self, tensor: int) -> range:
        record = self._plan.partition.tensors[tensor]
        if record.nbytes == 0:
            return range(0)
        return range(record.offset // self._span_nbytes, (record.end - 1) // self._span_nbytes + 1)

    @cached_property
    def _users_of_spans(self) -> list[int]:
        counts = [0] * -(-self._plan.partition.data_nbytes // self._span_nbytes)
        for tensor in range(len(self._plan.partition.tensors)):
            for span in self._spans_of(tensor):
                counts[span] += 1
        return counts
