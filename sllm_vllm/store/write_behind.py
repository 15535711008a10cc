"""Writes checkpoints that are loaded from a remote to the local disk, in the background of the loads.

The write-behind joins a load like a client, with its own lease: the lease's reads are not urgent, and it releases each
span once the span is on disk. Its writes wait while loads use the disk. The checkpoint is published when the partitions
of all ranks are complete. An interrupted write-behind resumes where it stopped the next time it is started.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Sequence

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import (
    CheckpointError,
    CheckpointUnreadable,
    RemoteError,
    SllmError,
    StoreError,
    WriteError,
)
from sllm_vllm.store.core.events import GiveSpan
from sllm_vllm.store.core.schedule import Urgency
from sllm_vllm.store.devices import Device
from sllm_vllm.store.places import Placed
from sllm_vllm.store.span_reader import KnownPartition
from sllm_vllm.store.staged_file import StagedCheckpoint, StagedPartition
from sllm_vllm.store.store import Store

logger = logging.getLogger(__name__)


class WriteBehind:
    """Runs on the daemon's event loop, with one task per checkpoint."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, placed: Placed) -> None:
        """Start writing a checkpoint, unless it is already being written."""
        if placed.name not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._run(placed))
            self._tasks[placed.name] = task
            task.add_done_callback(lambda _: self._tasks.pop(placed.name, None))

    async def close(self) -> None:
        """Cancel all tasks. What was written so far stays on disk."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, placed: Placed) -> None:
        try:
            if await self._make_room(placed):
                await self._write(placed)
                logger.info("event=written_behind checkpoint=%s", placed.name)
        except (CheckpointError, RemoteError, StoreError, WriteError) as error:
            logger.warning("event=not_written_behind checkpoint=%s reason=%s", placed.name, error)

    async def _make_room(self, placed: Placed) -> bool:
        """Remove checkpoints that a remote also has, least recently used first, until the new one fits the quota.

        Returns whether it fits now.
        """
        store, quota = self._store, self._store.config.disk_bytes
        if quota is None:
            return True
        usage = dict(await asyncio.to_thread(store.places.disk_usage))
        excess = sum(usage.values()) + placed.checkpoint.manifest.nbytes - quota
        for name in sorted(await asyncio.to_thread(store.places.removable, usage), key=store.places.last_used_s):
            if excess <= 0:
                break
            if not self._is_used(name):
                await asyncio.to_thread(store.places.repository.remove, name)
                excess -= usage[name]
                logger.info("event=removed_from_disk checkpoint=%s nbytes=%d", name, usage[name])
        if excess > 0:
            logger.warning("event=not_written_behind checkpoint=%s reason=disk_quota excess=%d", placed.name, excess)
        return excess <= 0

    def _is_used(self, name: str) -> bool:
        """Whether a checkpoint is being loaded or prefetched, is held by a client, or is pinned."""
        store = self._store
        mine = [known for known in store.known.values() if known.checkpoint == name]
        return any(known.num_users or store.cache.residency(known.spec.id).pinned for known in mine)

    async def _write(self, placed: Placed) -> None:
        store = self._store
        device = store.disk_device(os.stat(store.config.store_dir).st_dev)
        staged = await device.in_writer(lambda: self._stage(placed))
        try:
            for rank in range(len(staged.manifest.partitions)):
                partition = await device.in_writer(functools.partial(staged.partition, rank))
                try:
                    if not partition.is_complete:
                        await self._write_rank(device, partition, placed, rank=rank)
                finally:
                    await device.in_writer(partition.close)
            await device.in_writer(staged.publish)
        finally:
            await device.in_writer(staged.close)
        await asyncio.to_thread(store.places.note_origin, placed)

    def _stage(self, placed: Placed) -> StagedCheckpoint:
        path = placed.checkpoint.path / MANIFEST_NAME
        try:
            raw = read_plain(path, MANIFEST_NBYTES_MAX)
        except OSError as error:
            raise CheckpointUnreadable(path, f"it can't be read ({error.strerror})", "see its permissions") from None
        return StagedCheckpoint(self._store.places.repository, placed.name, raw)

    async def _write_rank(self, device: Device, staged: StagedPartition, placed: Placed, *, rank: int) -> None:
        """Take a lease on a rank's partition, and write each span as it arrives."""
        store, spans = self._store, _Spans()
        leased = await store.lease(placed, rank, hold=False, taker=spans, pid=None)
        known = store.known[store.leases[leased.token].partition]
        try:
            for _ in range(leased.num_spans):
                given = await spans.next()
                await self._write_span(device, staged, known, given=given)
                store.release(leased.token, (given.span,))
            await device.in_writer(staged.finish)
        finally:
            store.close_lease(leased.token)

    async def _write_span(
        self, device: Device, staged: StagedPartition, known: KnownPartition, *, given: GiveSpan
    ) -> None:
        """Write a span when no load needs the disk, unless all of its chunks are already there."""
        store, written = self._store, asyncio.get_running_loop().create_future()
        chunks, nbytes = known.chunks_of(given.span), known.span_nbytes(given.span)
        view = store.pool.slot_view(given.slot)[:nbytes]

        async def run() -> None:
            start = time.monotonic()
            try:
                await device.in_writer(lambda: staged.write(chunks, view))
            except Exception as error:  # top of a run loop: handed to the waiting task, which raises it
                written.set_exception(error)
            else:
                store.meters["write"].book(nbytes, start, time.monotonic())
                written.set_result(None)

        if set(chunks) & set(staged.missing):
            device.submit(Urgency.WRITE, run)
            await written


class _Spans:
    """Queues a lease's spans. Implements ``Taker``."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[GiveSpan | SllmError] = asyncio.Queue()

    def given(self, spans: Sequence[GiveSpan]) -> None:
        """See ``Taker``."""
        for span in spans:
            self._queue.put_nowait(span)

    def failed(self, error: SllmError) -> None:
        """See ``Taker``."""
        self._queue.put_nowait(error)

    async def next(self) -> GiveSpan:
        """Wait for the next span.

        Raises:
            SllmError: the span can't be read.
        """
        found = await self._queue.get()
        if isinstance(found, SllmError):
            raise found
        return found
