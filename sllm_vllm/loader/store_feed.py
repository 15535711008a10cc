"""Feeds a partition from the store's daemon, and from the disk if the daemon ends. Has ``ChunkPipeline``'s interface.

One thread receives spans. It maps those that may be kept, and queues the others for two threads that copy them. When
these have nothing to copy, they map the pages of mapped spans ahead of use. If the daemon ends, the missing chunks are
read from the disk into the same sink.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from sllm_vllm.errors import StoreError
from sllm_vllm.loader.core.plan import LoadPlan
from sllm_vllm.loader.pipeline import ChunkPipeline, reader_cpus, run_on
from sllm_vllm.loader.sink import ChunkSink
from sllm_vllm.loader.span_lease import Span, SpanLease
from sllm_vllm.loader.span_ways import SpanWay

COPIERS = 2
"""Copying threads. One copies at 0.7 to 1.0 times the rate of a plain memcpy, two at 1.0 to 1.5 times (16 MiB slots,
huge and 4 KiB pages)."""

logger = logging.getLogger(f"vllm.{__name__}")

OpenDisk = Callable[[Sequence[int]], contextlib.AbstractContextManager[ChunkPipeline]]
"""Reads the given chunks from the disk into the sink, in the given order."""


class ChunkFeed(Protocol):
    """Brings a partition's chunks to a sink while its context is open. Used by one consumer."""

    def wait(self, position: int) -> None:
        """Return once every chunk up to and including the plan's ``position`` is with the sink.

        Raises:
            CheckpointError, RemoteError, OSError: a chunk could not be delivered.
        """
        ...


class StoreFeed:
    """A context manager whose threads run while it is open. The daemon may send spans in any order.

    Spans are copied at most ``window`` chunks ahead of the consumer. While the consumer waits, any span that has
    arrived is copied, so that no deadlock is possible. After the context only spans that parameters use are held.
    """

    def __init__(
        self, lease: SpanLease, way: SpanWay, sink: ChunkSink, *, plan: LoadPlan, window: int, open_disk: OpenDisk
    ) -> None:
        self._lease = lease
        self._way = way
        self._sink = sink
        self._order = plan.order
        self._positions = {chunk: position for position, chunk in enumerate(plan.order)}
        self._window = window
        self._open_disk = open_disk
        self._changed = threading.Condition()
        self._copies: collections.deque[Span] = collections.deque()
        self._mapped: collections.deque[Span] = collections.deque()
        self._taken: set[int] = set()  # chunks of the spans received so far
        self._finished: set[int] = set()
        self._num_done = 0  # all positions below this one are done, or are read from the disk
        self._allowed = window
        self._is_waited_for = False
        self._has_all = False
        self._stopped = False
        self._error: BaseException | None = None
        self._disk: ChunkPipeline | None = None
        self._disk_positions: list[int] = []
        self._disk_stack = contextlib.ExitStack()
        self._cpus = reader_cpus(os.getppid())
        self._receiver = threading.Thread(target=self._receive, name="sllm-lease", daemon=True)
        names = (f"sllm-copy-{index}" for index in range(COPIERS))
        self._workers = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]

    def wait(self, position: int) -> None:
        """See ``ChunkFeed``."""
        with self._changed:
            self._allowed = max(self._allowed, position + 1 + self._window)
            self._is_waited_for = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._num_done > position)
            self._is_waited_for = False
            if self._error is not None:
                raise self._error
            disk = self._disk
        if disk is not None:
            disk.wait(bisect.bisect_right(self._disk_positions, position) - 1)

    def __enter__(self) -> Self:
        for thread in (self._receiver, *self._workers):
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop(None)
        for worker in self._workers:
            worker.join()
        self._disk_stack.close()
        for span in self._copies:
            self._lease.release(span.index)
        self._way.close()
        self._lease.end_receiving()
        # After a load that failed, parameters may still use spans, which keep the lease open. Then the receiver is not
        # joined: it releases the spans that still arrive, until the lease ends with the last of those parameters.
        if self._lease.is_closed or self._has_all:
            self._receiver.join()

    def _receive(self) -> None:
        run_on(self._cpus)
        num_left = self._lease.num_spans
        try:
            while num_left:
                spans = self._lease.next_spans()
                num_left -= len(spans)
                self._take(spans)
            with self._changed:
                self._has_all = True
                self._changed.notify_all()
        except StoreError as error:
            self._go_on_from_disk(error)
        except BaseException as error:  # top of a run loop: the consumer raises it
            self._stop(error)

    def _take(self, spans: Sequence[Span]) -> None:
        with self._changed:
            if self._stopped:
                for span in spans:
                    self._lease.release(span.index)
                return
            for span in spans:
                self._taken.update(span.chunks)
                if self._way.map(span):
                    self._mapped.append(span)
                    self._finished.update(self._positions[chunk] for chunk in span.chunks)
                else:
                    self._copies.append(span)
            self._advance()

    def _go_on_from_disk(self, error: StoreError) -> None:
        """Read the missing chunks from the disk; spans received from the lost daemon stay valid."""
        with self._changed:
            self._has_all = True
            if self._stopped:
                return
            positions = [position for position, chunk in enumerate(self._order) if chunk not in self._taken]
            logger.warning("event=store_lost reason=%r chunks_left=%d", str(error), len(positions))
            try:
                pipeline = self._open_disk([self._order[position] for position in positions])
                self._disk = self._disk_stack.enter_context(pipeline)
            except BaseException as failure:  # top of a run loop: the consumer raises it
                self._stop(failure)
                return
            self._disk_positions = positions
            self._finished.update(positions)
            self._advance()

    def _work(self) -> None:
        run_on(self._cpus)
        try:
            while (job := self._next_job()) is not None:
                job()
        except BaseException as error:  # top of a run loop: the consumer raises it
            self._stop(error)

    def _next_job(self) -> Callable[[], None] | None:
        """The next span to copy, if the window allows it, else one whose pages to map; None if the work is done."""
        with self._changed:
            self._changed.wait_for(self._has_job_or_end)
            if self._stopped:
                return None
            if self._may_copy():
                return partial(self._copy, self._copies.popleft())
            if self._mapped:
                return partial(self._way.populate, self._mapped.popleft())
            return None

    def _has_job_or_end(self) -> bool:
        is_at_end = self._has_all and not self._copies
        return self._stopped or self._may_copy() or bool(self._mapped) or is_at_end

    def _may_copy(self) -> bool:
        if not self._copies:
            return False
        return self._is_waited_for or self._positions[self._copies[0].chunks[0]] < self._allowed

    def _copy(self, span: Span) -> None:
        try:
            self._way.copy(span, self._finish)
        finally:
            self._lease.release(span.index)

    def _finish(self, chunk: int) -> None:
        with self._changed:
            self._finished.add(self._positions[chunk])
            self._advance()

    def _advance(self) -> None:
        while self._num_done in self._finished:
            self._finished.remove(self._num_done)
            self._num_done += 1
        self._changed.notify_all()

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._stopped = True
            self._error = self._error or error
            self._changed.notify_all()
        self._sink.stop()
