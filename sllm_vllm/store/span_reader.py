"""Fills slots: from disk in a reader's thread, else from a remote; every chunk is verified before anyone sees it."""

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
from sllm_vllm.store.devices import Device
from sllm_vllm.store.hops import HopMeter
from sllm_vllm.store.pool import Pool

if TYPE_CHECKING:
    from sllm_vllm.store.remote import Remote

logger = logging.getLogger(__name__)


class SpanFile:
    """A partition's file, open while somebody uses it. Asked from readers' threads."""

    def __init__(self, partition: RankPartition) -> None:
        self.partition = partition
        self._lock = threading.Lock()
        self._file: ChunkFile | None = None

    def read(self, buffer: memoryview, offset: int, nbytes: int) -> str:
        """Fill ``buffer[:nbytes]`` from ``offset`` of the file; "disk" or "cache".

        Raises:
            CheckpointError: it can't be opened or read.
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
        """Open it now, so that it can be read even if its name goes.

        Raises:
            CheckpointError: it can't be opened, or has another size.
        """
        with self._lock:
            self._file = self._file or self.partition.open()

    def close(self) -> None:
        """Close it; the next read opens it anew. No read may be under way."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None


@dataclass(slots=True)
class KnownPartition:
    """A rank's partition that the core knows, and where its bytes come from."""

    spec: PartitionSpec
    partition: RankPartition
    rank: int
    checkpoint: str
    chunks_per_span: int
    device: Device | None = None
    file: SpanFile | None = None
    remote: Remote | None = None
    num_users: int = 0
    """Leases and prefetches; while there is one, the file stays open."""
    jobs: dict[int, tuple[Device, int]] = field(default_factory=dict)
    """Reads under way, by span."""

    def chunks_of(self, span: int) -> range:
        """The chunks a span holds."""
        first = span * self.chunks_per_span
        return range(first, min(first + self.chunks_per_span, len(self.partition.record.chunks)))

    def span_nbytes(self, span: int) -> int:
        """Bytes of a span."""
        return sum(self.partition.chunk_range(chunk)[1] for chunk in self.chunks_of(span))

    def close_if_idle(self) -> None:
        """Close the file unless somebody uses it."""
        if self.file is not None and self.num_users == 0 and not self.jobs:
            self.file.close()


def spec_of(partition: RankPartition, name: str, chunks_per_span: int) -> PartitionSpec:
    """What the core needs to know of a partition."""
    chunks = load_order(partition.record.tensors, partition.manifest.chunk_nbytes)
    order = tuple(dict.fromkeys(chunk // chunks_per_span for chunk in chunks))
    assert len(order) == num_chunks(len(partition.record.chunks), chunks_per_span)
    return PartitionSpec(partition.content_digest, name, order, partition.record.data_nbytes)


class SpanReader:
    """Turns the core's orders into jobs of devices. Lives on the daemon's loop.

    Args:
        find_remote: a remote that has the same partition, for when the disk fails; None if no remote does.
        done: called with an order and None, or the error, when its slot is filled or can't be.
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
        """Have a slot filled."""
        urgency = Urgency.LOAD if order.is_urgent else Urgency.FILL
        if known.file is not None and known.device is not None:
            self._submit(known, order, known.device, urgency=urgency)
        else:
            self._submit(known, order, self._network, urgency=urgency)

    def hurry(self, known: KnownPartition, span: int) -> None:
        """An engine waits for a fill."""
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
        """Fill the slot from a device; what went wrong, if anything did."""
        try:
            if device is self._network:
                await self._fetch(known, order)
            else:
                await device.in_reader(lambda: self._read(known, order))
        except SllmError as error:
            return error
        except Exception as error:  # top of a run loop: who waits for the slot must hear of it
            logger.exception("event=read_broke partition=%s span=%d", order.partition, order.span)
            problem = f"reading it broke ({type(error).__name__})"
            return CheckpointUnreadable(known.partition.path, problem, "see the log of the store's daemon")
        return None

    async def _has_remote(self, known: KnownPartition) -> bool:
        """Whether some remote can stand in for the disk."""
        with contextlib.suppress(SllmError):  # also a disk too full to keep the remote's manifest
            known.remote = known.remote or await self._find_remote(known)
        return known.remote is not None

    def _end(self, known: KnownPartition, order: StartRead, error: SllmError | None) -> None:
        known.jobs.pop(order.span, None)
        self._done(order, error)

    def _read(self, known: KnownPartition, order: StartRead) -> None:
        """In a reader's thread."""
        assert known.file is not None
        chunks, nbytes = known.chunks_of(order.span), known.span_nbytes(order.span)
        view, start = self._pool.slot_view(order.slot), time.monotonic()
        hop = known.file.read(view, known.partition.chunk_range(chunks[0])[0], nbytes)
        self._meters[hop].book(nbytes, start, time.monotonic())
        check_chunks(known.partition, chunks, view[:nbytes])

    async def _fetch(self, known: KnownPartition, order: StartRead) -> None:
        from sllm_vllm.store.fetch import fetch_span  # a machine without remotes need not have obstore

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
    """Hold consecutive chunks against their checksums.

    Raises:
        CheckpointCorrupt: one differs.
    """
    start = 0
    for chunk in chunks:
        nbytes = partition.chunk_range(chunk)[1]
        partition.check_chunk(chunk, data[start : start + nbytes])
        start += nbytes
