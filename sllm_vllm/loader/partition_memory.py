"""One partition in this process's memory: private pages, or the store's own, and who still looks at which.

Whoever looks at a tensor holds an array over it; when the array dies, so does its claim on the memory below. A span of
the store's that nobody looks at any more is unmapped and handed back. Needs numpy alone.
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
"""A process may have 65,530 mappings by default; each span takes one, and splits one at worst."""


class Serial:
    """Runs calls one after the other, each in whichever thread is at it.

    For finalisers: these run in any thread, at any line, also inside this class, so that they may wait for no lock.
    ``run`` never waits: if a call is under way, here or elsewhere, whoever is at it runs this one next.
    """

    def __init__(self) -> None:
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._busy = threading.Lock()

    def run(self, call: Callable[[], None]) -> None:
        """Have ``call`` run, now or very soon."""
        self._calls.append(call)
        while self._calls and self._busy.acquire(blocking=False):
            try:
                while self._calls:
                    self._calls.popleft()()
            finally:
                self._busy.release()


class PartitionMemory:
    """Memory of a partition's size, addressed like its data.

    A tensor is *settled* when nobody looks at it any more. ``claim`` and ``settle_rest`` belong to the consumer, once
    the tensor's bytes are there; ``map_span`` to whoever is given spans, before that.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._space = AddressSpace(plan.partition.data_nbytes)
        self._serial = Serial()
        self._claimed: set[int] = set()
        self._span_nbytes = 0
        self._num_users: dict[int, int] = {}  # of each mapped span, the tensors that are not settled
        self._released: Callable[[int], None] = lambda span: None

    def chunk(self, chunk: int) -> memoryview:
        """A chunk's place, up to the end of its last page."""
        nbytes = round_up(self._plan.chunk_size(chunk), mmap.PAGESIZE)
        return self._space.array(chunk * self._plan.chunk_nbytes, nbytes).data

    def claim(self, tensor: int) -> ByteArray | None:
        """A tensor's bytes: its memory goes when the array dies. None if it was claimed before, or has no bytes."""
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
        """Nobody will claim the tensors that were not claimed yet."""
        for tensor, record in enumerate(self._plan.partition.tensors):
            if tensor not in self._claimed and record.nbytes:
                self._claimed.add(tensor)
                self._settle(tensor)

    def accept_spans(self, span_nbytes: int, released: Callable[[int], None]) -> None:
        """From now on ``map_span`` is allowed; ``released`` is told of each mapped span that nobody looks at any more.

        It is called at most once a span, from any thread, and may be called from a finaliser.
        """
        self._span_nbytes, self._released = span_nbytes, released

    def map_span(self, span: int, *, fd: int, file_offset: int) -> bool:
        """Show a file's bytes in place of a span, privately; False if they have to be copied here instead."""
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
        """Have a mapped span's pages in place before anybody reads them. It may have been released meanwhile."""
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
