"""Reads chunks ahead of the consumer, on several threads, within a bounded window.

Each thread takes the next chunk in plan order, reads it, hands it to the sink and continues with the next one, without
a barrier between chunks. The consumer says which position it waits for. No chunk beyond that position plus the window
is begun, so that the memory in flight is bounded. Chunks up to that position may always be read, so that no deadlock is
possible.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.errors import CheckpointUnreadable
from sllm_vllm.loader.report import HopCounter
from sllm_vllm.loader.sink import ChunkSink

# Chooses the processors that the loader's own threads run on. vLLM pins a CPU worker's main thread to its compute
# cores before it loads the model. Threads inherit that, so readers would compete with the packing for those cores. The
# affinity that this process had before is that of its parent.


def reader_cpus(parent_pid: int) -> set[int]:
    """Processors for readers: the parent's without those this thread is pinned to, or the latter if none are left."""
    own = os.sched_getaffinity(0)
    try:
        allowed = os.sched_getaffinity(parent_pid)
    except OSError:  # the parent is another user's process, or has ended
        return own
    return (allowed - own) or own


def run_on(cpus: set[int]) -> None:
    """Move the calling thread to ``cpus``; it keeps its affinity if the system refuses."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return


# Sources of chunks; today only the disk. A source is used by several threads at once.


class ChunkSource(Protocol):
    """Provides the chunks of one partition. Thread-safe."""

    def read(self, chunk: int, buffer: memoryview) -> int:
        """Read a chunk into the page-aligned ``buffer``, and verify it if the source does that.

        Returns:
            Number of bytes.

        Raises:
            CheckpointCorrupt: the bytes differ from those that were written.
            CheckpointUnreadable: the device failed.
        """
        ...


class DiskSource:
    """Reads chunks from the partition's file in this process, without a daemon."""

    def __init__(self, partition: RankPartition, file: ChunkFile, *, verify: bool, counter: HopCounter) -> None:
        self._partition = partition
        self._file = file
        self._verify = verify
        self._counter = counter

    def read(self, chunk: int, buffer: memoryview) -> int:
        """See ``ChunkSource``."""
        offset, nbytes = self._partition.chunk_range(chunk)
        start = time.perf_counter()
        try:
            tier = self._file.read_into(buffer, offset, nbytes)
        except OSError as error:
            problem = f"chunk {chunk} can't be read ({error.strerror})"
            raise CheckpointUnreadable(
                self._file.path, problem, "mend the device, or remove and convert again"
            ) from None
        read = time.perf_counter()
        self._counter.add("read_disk" if tier == "disk" else "read_cache", nbytes, start_s=start, end_s=read)
        if self._verify:
            self._partition.check_chunk(chunk, buffer[:nbytes])
            self._counter.add("verify", nbytes, start_s=read, end_s=time.perf_counter())
        return nbytes


READERS_MAX = 4
"""Default number of readers, unless there are fewer processors: with more readers than processors, they only pass the
interpreter's lock around (docs/decisions/0002)."""


class ChunkPipeline:
    """A context manager whose threads run while it is open. Used by one consumer, which gets the first thread's error.

    Args:
        order: chunk indices in the order in which they are needed.
        num_threads: number of readers; None for four, or one per available processor if there are fewer.
        window: how many chunks may be begun beyond the position waited for.
    """

    def __init__(
        self, source: ChunkSource, sink: ChunkSink, order: Sequence[int], *, num_threads: int | None, window: int
    ) -> None:
        self._source = source
        self._sink = sink
        self._order = order
        self._window = window
        self._changed = threading.Condition()
        self._next = 0
        self._allowed = window
        self._finished: set[int] = set()
        self._num_done = 0  # all positions below this one are done
        self._error: BaseException | None = None
        self._stopped = False
        self._cpus = reader_cpus(os.getppid())
        num_readers = min(num_threads or min(READERS_MAX, len(self._cpus)), len(order))
        names = (f"sllm-read-{index}" for index in range(num_readers))
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]

    def wait(self, position: int) -> None:
        """Return once every chunk up to and including ``position`` is with the sink.

        Raises:
            CheckpointCorrupt, OSError: a reader failed; its error, of whatever kind.
        """
        with self._changed:
            self._allowed = max(self._allowed, position + 1 + self._window)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._num_done > position)
            if self._error is not None:
                raise self._error

    @property
    def is_done(self) -> bool:
        """Whether every chunk was delivered."""
        with self._changed:
            return self._num_done == len(self._order)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        run_on(self._cpus)
        try:
            while (position := self._take()) is not None:
                chunk = self._order[position]
                buffer = self._sink.buffer(chunk)
                self._sink.deliver(chunk, buffer, self._source.read(chunk, buffer))
                self._finish(position)
        except BaseException as error:  # top of a run loop: the consumer raises it
            self._stop(error)

    def _take(self) -> int | None:
        """The next position to read, once the window allows it; None if there is none left or the pipeline stopped."""

        def ready() -> bool:
            return self._stopped or self._next >= len(self._order) or self._next < self._allowed

        with self._changed:
            self._changed.wait_for(ready)
            if self._stopped or self._next >= len(self._order):
                return None
            self._next += 1
            return self._next - 1

    def _finish(self, position: int) -> None:
        with self._changed:
            self._finished.add(position)
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
