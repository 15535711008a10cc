"""``Store`` owns the core and carries out its actions. Runs on the daemon's event loop; only it changes the core."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sllm_vllm.checkpoint.reader import Checkpoint, RankPartition
from sllm_vllm.config import StoreConfig
from sllm_vllm.errors import SllmError, StoreRefused
from sllm_vllm.store.calibrate import Calibration
from sllm_vllm.store.core.cache import Cache
from sllm_vllm.store.core.events import (
    DropSpan,
    Event,
    EvictAsked,
    FailLease,
    GiveSpan,
    HurryRead,
    LeaseClosed,
    LeaseOpened,
    PartitionKnown,
    PinAsked,
    PrefetchAsked,
    PrefetchEnded,
    ReadDone,
    ReadFailed,
    SpansReleased,
    StartRead,
)
from sllm_vllm.store.core.policy import policy_named
from sllm_vllm.store.devices import Device, HopMeter
from sllm_vllm.store.places import Placed, Places
from sllm_vllm.store.pool import Pool
from sllm_vllm.store.protocol import Leased
from sllm_vllm.store.span_reader import KnownPartition, SpanFile, SpanReader, spec_of

if TYPE_CHECKING:
    from sllm_vllm.store.remote import Remote

logger = logging.getLogger(__name__)

READERS_DEFAULT = 4
WRITERS_DEFAULT = 1
DISK_BPS_DEFAULT = 2e9
REMOTE_BPS_DEFAULT = 3e8
"""Assumed bytes per second before anything was measured: an SSD, and a network of a few gigabits per second."""


class Taker(Protocol):
    """The holder of a lease: a connection or the write-behind. Called on the event loop; must not block or raise."""

    def given(self, spans: Sequence[GiveSpan]) -> None:
        """Take spans that are now in memory."""
        ...

    def failed(self, error: SllmError) -> None:
        """Take note that the lease failed; it gets no more spans."""
        ...


@dataclass(slots=True)
class LeaseRecord:
    """What the store knows about a lease in addition to the core."""

    partition: str
    taker: Taker
    pid: int
    opened_s: float


class Store:
    """The checkpoints in memory, and the reads that bring them there.

    Args:
        calibration: the disk's speed as measured by ``sllm-vllm store calibrate``; None if it was not run.
    """

    def __init__(self, config: StoreConfig, pool: Pool, places: Places, *, calibration: Calibration | None) -> None:
        self.config = config
        self.pool = pool
        self.places = places
        self.calibration = calibration
        self.meters = {name: HopMeter() for name in ("disk", "cache", "remote", "write")}
        self.known: dict[str, KnownPartition] = {}
        self.leases: dict[int, LeaseRecord] = {}
        self.cache = Cache(pool.num_slots, policy=policy_named(config.policy))
        self.devices: dict[int, Device] = {}
        self.network = self._new_device(config.downloads, 1)
        self._reader = SpanReader(
            pool,
            self.network,
            config=config,
            meters=self.meters,
            find_remote=self._find_remote,
            done=self._read_ended,
        )
        self._prefetches: dict[int, asyncio.Future[PrefetchEnded]] = {}
        self._requests = itertools.count(1)
        self._tokens = itertools.count(time.time_ns())  # increases across restarts, too

    async def lease(self, placed: Placed, rank: int, *, hold: bool, taker: Taker, pid: int | None) -> Leased:
        """Open a lease. ``taker`` gets its spans from the next turn of the event loop on.

        Args:
            pid: the client's process; None for the daemon's own write-behind, whose lease is not urgent.

        Raises:
            CheckpointError: the checkpoint can't be opened. StoreRefused: its chunks are too large for the pool.
        """
        known = await self.know(placed, rank)
        token = next(self._tokens)
        known.num_users += 1
        self.leases[token] = LeaseRecord(known.spec.id, taker, pid or os.getpid(), time.monotonic())
        event = LeaseOpened(token, known.spec.id, hold, is_urgent=pid is not None)
        asyncio.get_running_loop().call_soon(self._handle_if_leased, event)
        return Leased(token=token, chunks_per_span=known.chunks_per_span, num_spans=len(known.spec.order))

    def release(self, token: int, spans: tuple[int, ...]) -> None:
        """Release spans that the lease's client no longer uses."""
        self._handle(SpansReleased(token, spans))

    def close_lease(self, token: int) -> None:
        """End a lease, because its client closed it or died."""
        record = self.leases.pop(token, None)
        if record is not None:
            self._handle(LeaseClosed(token))
            self._leave(record.partition)

    async def prefetch(self, placed: Placed) -> list[asyncio.Future[PrefetchEnded]]:
        """Start reading every rank of a checkpoint into memory. Returns a future per rank, done when its prefetch ends.

        Raises:
            CheckpointError: the checkpoint can't be opened. StoreRefused: its chunks are too large for the pool.
        """
        futures = []
        for rank in range(len(placed.checkpoint.manifest.partitions)):
            known = await self.know(placed, rank)
            request, future = next(self._requests), asyncio.get_running_loop().create_future()
            known.num_users += 1
            self._prefetches[request] = future
            self._handle(PrefetchAsked(request, known.spec.id))
            futures.append(future)
        return futures

    async def evict(self, placed: Placed) -> int:
        """Drop all spans that no client holds. Returns the number of spans that remain."""
        remaining = 0
        for rank in range(len(placed.checkpoint.manifest.partitions)):
            partition = placed.partition(rank).content_digest
            if partition in self.known:
                self._handle(EvictAsked(partition))
                remaining += self.cache.residency(partition).num_resident
                self._tidy(partition)
        return remaining

    async def pin(self, placed: Placed, *, pinned: bool) -> None:
        """Pin or unpin all ranks of a checkpoint.

        Raises:
            StoreRefused: too little of the pool would be left for loads.
        """
        for rank in range(len(placed.checkpoint.manifest.partitions)):
            known = await self.know(placed, rank)
            if pinned and not self.cache.can_pin(known.spec.id):
                problem = f"{placed.name} can't be pinned: too little of the pool would be left for loads"
                raise StoreRefused(self.config.socket_path, problem, "unpin another, or give --memory more")
            self._handle(PinAsked(known.spec.id, pinned))

    async def know(self, placed: Placed, rank: int) -> KnownPartition:
        """Make a rank's partition known to the core, and open its file if it is on disk.

        Raises:
            CheckpointError: the file can't be opened. StoreRefused: the chunks are too large for the pool.
        """
        partition = placed.partition(rank)
        chunks_per_span = self.pool.slot_nbytes // partition.manifest.chunk_nbytes
        if chunks_per_span == 0:
            problem = (
                f"chunks of {partition.manifest.chunk_nbytes} bytes do not fit into slots of {self.pool.slot_nbytes}"
            )
            raise StoreRefused(self.config.socket_path, problem, "start the daemon with a larger --slot-size")
        file, device = None, None
        if placed.is_on_disk:
            file = SpanFile(partition)
            await asyncio.to_thread(file.open)
            device = self.disk_device(os.stat(placed.checkpoint.path).st_dev)
        partition_id = partition.content_digest
        known = self.known.get(partition_id)
        if known is None:
            spec = spec_of(partition, f"{placed.name}/{rank}", chunks_per_span)
            known = KnownPartition(spec, partition, rank, placed.name, chunks_per_span)
            self.known[partition_id] = known
        if file is not None:
            self._renew_file(known, partition, file)
            known.device = device
        known.remote = placed.remote or known.remote
        self._handle(PartitionKnown(known.spec, self._bps(known)))
        return known

    def disk_device(self, number: int) -> Device:
        """Return the device with this ``st_dev``, with readers and writers as configured or calibrated."""
        if number not in self.devices:
            calibration = self.calibration
            readers = self.config.readers or (calibration.readers if calibration else READERS_DEFAULT)
            writers = self.config.writers or (calibration.writers if calibration else WRITERS_DEFAULT)
            self.devices[number] = self._new_device(readers, writers)
        return self.devices[number]

    async def close(self) -> None:
        """Stop all transfers. No slot is written afterwards."""
        for device in (self.network, *self.devices.values()):
            await device.close()
        for known in self.known.values():
            if known.file is not None:
                known.file.close()

    async def _find_remote(self, known: KnownPartition) -> Remote | None:
        checkpoint = Checkpoint(known.partition.directory, known.partition.manifest)
        return await self.places.remote_for(known.checkpoint, checkpoint)

    def _new_device(self, num_readers: int, num_writers: int) -> Device:
        return Device(num_readers, num_writers, starve_s=self.config.starve_s, pauses=self.config.pause_fills)

    def _bps(self, known: KnownPartition) -> float:
        """Return the expected bytes per second of the hop that the partition is read over: disk or remote."""
        if known.file is not None:
            limit = self.calibration.read_bps if self.calibration else DISK_BPS_DEFAULT
            return self.meters["disk"].bps or limit
        return self.meters["remote"].bps or REMOTE_BPS_DEFAULT

    def _renew_file(self, known: KnownPartition, partition: RankPartition, file: SpanFile) -> None:
        """Switch to the file as it is now: it may have been removed and written again since it was last opened."""
        if known.file is not None and known.jobs:
            file.close()  # the old file is being read; its bytes are the same
            return
        if known.file is not None:
            known.file.close()
        known.partition, known.file = partition, file

    def _handle_if_leased(self, event: LeaseOpened) -> None:
        if event.token in self.leases:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        """Pass an event to the core and carry out the actions that it returns."""
        given: dict[int, list[GiveSpan]] = {}
        failed: list[FailLease] = []
        for action in self.cache.handle(event, time.monotonic()):
            match action:
                case StartRead():
                    self._reader.start(self.known[action.partition], action)
                case HurryRead():
                    self._reader.hurry(self.known[action.partition], action.span)
                case GiveSpan():
                    given.setdefault(action.token, []).append(action)
                case FailLease():
                    failed.append(action)
                case PrefetchEnded():
                    self._end_prefetch(action)
                case DropSpan():
                    pass
        for token, spans in given.items():
            self.leases[token].taker.given(spans)
        for failure in failed:
            assert isinstance(failure.error, SllmError)
            self.leases[failure.token].taker.failed(failure.error)

    def _read_ended(self, order: StartRead, error: SllmError | None) -> None:
        if error is None:
            self._handle(ReadDone(order.partition, order.span, order.slot))
        else:
            logger.warning("event=read_failed partition=%s span=%d reason=%s", order.partition, order.span, error)
            self._handle(ReadFailed(order.partition, order.span, order.slot, error))
        self._tidy(order.partition)

    def _end_prefetch(self, ended: PrefetchEnded) -> None:
        future = self._prefetches.pop(ended.request)
        if not future.done():
            future.set_result(ended)
        asyncio.get_running_loop().call_soon(self._leave, ended.partition)

    def _leave(self, partition: str) -> None:
        """Count one user less of a partition, after a lease or prefetch of it ended."""
        self.known[partition].num_users -= 1
        self._tidy(partition)

    def _tidy(self, partition: str) -> None:
        """Close a partition's file if it is not in use, and forget the partition if nothing of it is in memory."""
        known = self.known.get(partition)
        if known is None or known.num_users or known.jobs:
            return
        known.close_if_idle()
        if self.cache.forget(partition) or partition not in self.cache.partitions:
            del self.known[partition]
