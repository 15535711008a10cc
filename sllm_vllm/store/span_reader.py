"""Fills slots, from disk in a reader thread or from a remote. Every chunk is verified before a client can see it."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.core.layout import load_order
from sllm_vllm.checkpoint.core.manifest import num_chunks
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.config import StoreConfig
from sllm_vllm.errors import CheckpointUnreadable, RemoteError, SllmError
from sllm_vllm.store.core.events import PartitionSpec, StartRead
from sllm_vllm.store.core.schedule import Urgency
from sllm_vllm.store.devices import Device, HopMeter
from sllm_vllm.store.pool import Pool

if TYPE_CHECKING:
    from sllm_vllm.store.remote import Remote

logger = logging.getLogger(__name__)


class SpanFile:
    """A partition's file, kept open while it is in use. Several reader threads may call it at once."""

    def __init__(self, partition: RankPartition) -> None:
        self.partition = partition
        self._lock = threading.Lock()
        self._file: ChunkFile | None = None

    def read(self, buffer: memoryview, offset: int, nbytes: int) -> str:
        """Fill ``buffer[:nbytes]`` from ``offset`` in the file. Returns "disk" or "cache", where the bytes came from.

        Raises:
            CheckpointError: the file can't be opened or read.
        """
        with self._lock:
            self._file = self._file or self.partition.open()
            file = self._file
        try:
            return file.read_into(buffer, offset, nbytes)
        except OSError as error:
            problem = f"it can't be read ({error.strerror})"
            mend = "mend the device, or remove and convert again"
            raise CheckpointUnreadable(self.partition.path, problem, mend) from None

    def open(self) -> None:
        """Open the file now, so that it stays readable even if it is removed.

        Raises:
            CheckpointError: the file can't be opened, or has the wrong size.
        """
        with self._lock:
            self._file = self._file or self.partition.open()

    def close(self) -> None:
        """Close the file; the next read opens it again. No read may be running."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None


@dataclass(slots=True)
class KnownPartition:
    """A rank's partition that the core knows, and where its bytes are read from."""

    spec: PartitionSpec
    partition: RankPartition
    rank: int
    checkpoint: str
    chunks_per_span: int
    device: Device | None = None
    file: SpanFile | None = None
    remote: Remote | None = None
    num_users: int = 0
    """Number of leases and prefetches. The file stays open while there are any."""
    jobs: dict[int, tuple[Device, int]] = field(default_factory=dict)
    """Reads in progress, by span: the device and its job number."""

    def chunks_of(self, span: int) -> range:
        """Return the range of chunks in a span."""
        first = span * self.chunks_per_span
        return range(first, min(first + self.chunks_per_span, len(self.partition.record.chunks)))

    def span_nbytes(self, span: int) -> int:
        """Return the size of a span in bytes."""
        return sum(self.partition.chunk_range(chunk)[1] for chunk in self.chunks_of(span))

    def close_if_idle(self) -> None:
        """Close the file unless it is in use."""
        if self.file is not None and self.num_users == 0 and not self.jobs:
            self.file.close()


def spec_of(partition: RankPartition, name: str, chunks_per_span: int) -> PartitionSpec:
    """Describe a partition for the core."""
    chunks = load_order(partition.record.tensors, partition.manifest.chunk_nbytes)
    order = tuple(dict.fromkeys(chunk // chunks_per_span for chunk in chunks))
    assert len(order) == num_chunks(len(partition.record.chunks), chunks_per_span)
    return PartitionSpec(partition.content_digest, name, order, partition.record.data_nbytes)


class SpanReader:
    """Turns the core's ``StartRead`` orders into device jobs. Runs on the daemon's event loop.

    Args:
        find_remote: returns a remote that has the same partition, used if the disk fails; None if no remote has it.
        done: called when a read ends, with its order and the error, or None if the slot is filled.
    """

    def __init__(
        self,
        pool: Pool,
        network: Device,
        *,
        config: StoreConfig,
        meters: dict[str, HopMeter],
        find_remote: Callable[[KnownPartition], Awaitable[Remote | None]],
        done: Callable[[StartRead, SllmError | None], None],
    ) -> None:
        self._pool = pool
        self._network = network
        self._config = config
        self._meters = meters
        self._find_remote = find_remote
        self._done = done
        self._random = random.Random()  # jitter between attempts; nothing depends on its values

    def start(self, known: KnownPartition, order: StartRead) -> None:
        """Start filling a slot, from disk if the partition has a file, otherwise from a remote."""
        urgency = Urgency.LOAD if order.is_urgent else Urgency.FILL
        if known.file is not None and known.device is not None:
            self._submit(known, order, known.device, urgency=urgency)
        else:
            self._submit(known, order, self._network, urgency=urgency)

    def hurry(self, known: KnownPartition, span: int) -> None:
        """Make a queued read urgent, because an engine now waits for it."""
        if span in known.jobs:
            device, job = known.jobs[span]
            device.promote(job)

    def _submit(self, known: KnownPartition, order: StartRead, device: Device, *, urgency: Urgency) -> None:
        async def run() -> None:
            error = await self._fill(known, order, device)
            if error is None or device is self._network or not await self._has_remote(known):
                self._end(known, order, error)
            else:
                logger.warning("event=disk_failed reading=remote reason=%s", error)
                self._submit(known, order, self._network, urgency=Urgency.LOAD)

        known.jobs[order.span] = (device, device.submit(urgency, run))

    async def _fill(self, known: KnownPartition, order: StartRead, device: Device) -> SllmError | None:
        """Fill the slot from a device. Returns the error, or None on success."""
        try:
            if device is self._network:
                await self._fetch(known, order)
            else:
                await device.in_reader(lambda: self._read(known, order))
        except SllmError as error:
            return error
        except Exception as error:  # top of a run loop: the leases that wait for the slot must get the error
            logger.exception("event=read_broke partition=%s span=%d", order.partition, order.span)
            problem = f"reading it broke ({type(error).__name__})"
            return CheckpointUnreadable(known.partition.path, problem, "see the log of the store's daemon")
        return None

    async def _has_remote(self, known: KnownPartition) -> bool:
        """Whether a remote has the partition, so that it can be read from there instead of the disk."""
        with contextlib.suppress(SllmError):  # includes a disk too full to save the remote's manifest
            known.remote = known.remote or await self._find_remote(known)
        return known.remote is not None

    def _end(self, known: KnownPartition, order: StartRead, error: SllmError | None) -> None:
        known.jobs.pop(order.span, None)
        self._done(order, error)

    def _read(self, known: KnownPartition, order: StartRead) -> None:
        """Read a span from the file and verify it. Runs in a reader thread."""
        assert known.file is not None
        chunks, nbytes = known.chunks_of(order.span), known.span_nbytes(order.span)
        view, start = self._pool.slot_view(order.slot), time.monotonic()
        hop = known.file.read(view, known.partition.chunk_range(chunks[0])[0], nbytes)
        self._meters[hop].book(nbytes, start, time.monotonic())
        check_chunks(known.partition, chunks, view[:nbytes])

    async def _fetch(self, known: KnownPartition, order: StartRead) -> None:
        from sllm_vllm.store.fetch import fetch_span  # obstore is needed only with remotes

        if known.remote is None:
            problem, mend = "no remote has it", "convert the model again, or name a remote that has it"
            raise RemoteError(known.partition.path, problem, mend)
        chunks, nbytes, start = known.chunks_of(order.span), known.span_nbytes(order.span), time.monotonic()
        await fetch_span(
            known.remote,
            known.partition,
            chunks,
            into=self._pool.slot_view(order.slot)[:nbytes],
            limits=self._config,
            jitter=self._random,
        )
        self._meters["remote"].book(nbytes, start, time.monotonic())


def check_chunks(partition: RankPartition, chunks: range, data: memoryview) -> None:
    """Verify the checksums of consecutive chunks.

    Raises:
        CheckpointCorrupt: a chunk differs from its checksum.
    """
    start = 0
    for chunk in chunks:
        nbytes = partition.chunk_range(chunk)[1]
        partition.check_chunk(chunk, data[start : start + nbytes])
        start += nbytes
