"""Copies whole checkpoints between the local disk and a remote: ``push`` and ``pull``. Called by the CLI.

Both verify every chunk, hold only a few chunks in memory, and never expose an incomplete checkpoint: at a remote, the
manifest makes a checkpoint visible, and it is written last.
"""

from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.core.manifest import DATA_ALIGNMENT, MANIFEST_NAME, Manifest, parse_manifest
from sllm_vllm.checkpoint.reader import MEND_CORRUPT, Checkpoint, RankPartition
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import MANIFEST_NBYTES_MAX, StoreConfig
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointInvalid,
    CheckpointUnreadable,
    DiskFull,
    RemoteCorrupt,
    RemoteMissing,
    WriteError,
)
from sllm_vllm.store.fetch import FetchLimits, fetch_header, fetch_manifest, fetch_span
from sllm_vllm.store.remote import Remote, open_checkpoint_url
from sllm_vllm.store.staged_file import StagedCheckpoint, StagedPartition
from sllm_vllm.units import round_up

PARALLEL_DEFAULT = 8
WRITERS_MAX = 4
OnProgress = Callable[[int, int], None]
"""Called with the bytes done so far and the total bytes of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """The result of a push or pull."""

    place: str
    """Where the checkpoint is now: a directory, or a URL without secrets."""
    nbytes: int
    was_there: bool
    """Whether the same checkpoint was already there, so that nothing was copied."""


@dataclass(slots=True)
class _TransferProgress:
    """Bytes done so far. Used only on the event loop."""

    told: OnProgress
    total: int
    done: int = 0

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more bytes and report the progress."""
        self.done += nbytes
        self.told(self.done, self.total)


def _ignored(done: int, total: int) -> None:
    """Do nothing: the default for ``on_progress``."""


async def push_checkpoint(
    checkpoint: Checkpoint,
    url: str,
    *,
    overwrite: bool = False,
    endpoint: str | None = None,
    on_progress: OnProgress = _ignored,
) -> Transferred:
    """Copy a checkpoint to ``url``, whose last component is the checkpoint's name there.

    Raises:
        CheckpointError: the checkpoint is corrupt or can't be read; it does not become visible at the remote.
        WriteError: another checkpoint exists there, and ``overwrite`` is false.
        ConfigError: ``url`` is not a URL that can be written to.
        RemoteError: the remote refuses, or the connection breaks.
    """
    remote, name = open_checkpoint_url(url, endpoint=endpoint)
    remote.require_writable()
    raw = await asyncio.to_thread(_read_manifest, checkpoint)
    place, nbytes = f"{remote.shown}/{name}", checkpoint.manifest.nbytes
    try:
        there = await remote.read_manifest(name)
    except RemoteMissing:
        there = None
    if there == raw:
        return Transferred(place, nbytes, was_there=True)
    if there is not None:
        if not overwrite:
            raise WriteError(place, "there is another checkpoint", "give --overwrite or another URL")
        await remote.remove(name, MANIFEST_NAME)  # otherwise readers could see a mix of old and new partitions
    progress = _TransferProgress(on_progress, nbytes)
    for record in checkpoint.manifest.partitions:
        content = _sound_pieces(checkpoint.partition(record.rank), progress)
        await remote.put(name, record.path, content, nbytes=record.nbytes)
    await remote.put(name, MANIFEST_NAME, raw, nbytes=len(raw))
    return Transferred(place, nbytes, was_there=False)


def _read_manifest(checkpoint: Checkpoint) -> bytes:
    path = checkpoint.path / MANIFEST_NAME
    try:
        raw = read_plain(path, MANIFEST_NBYTES_MAX)
    except OSError as error:
        raise CheckpointUnreadable(path, f"it can't be read ({error.strerror})", "fix its permissions") from None
    if parse_manifest(raw, str(path)) != checkpoint.manifest:
        raise CheckpointCorrupt(path, "it changed since it was opened", "try again")
    return raw


async def _sound_pieces(partition: RankPartition, progress: _TransferProgress) -> AsyncIterator[memoryview]:
    """Yield the verified header and chunks of a partition, each in its own buffer: obstore keeps references to them."""
    with await asyncio.to_thread(partition.open) as file:
        await asyncio.to_thread(partition.check_header, file)
        for index in range(-1, len(partition.record.chunks)):
            buffer = await asyncio.to_thread(_read_sound, partition, file, index)
            yield buffer
            progress.add(len(buffer))


def _read_sound(partition: RankPartition, file: ChunkFile, index: int) -> memoryview:
    """Read and verify chunk ``index``; for -1, read the header, which the caller has verified."""
    offset, nbytes = partition.chunk_range(index) if index >= 0 else (0, partition.record.header_nbytes)
    buffer = memoryview(mmap.mmap(-1, round_up(nbytes, DATA_ALIGNMENT)))
    try:
        file.read_into(buffer, offset, nbytes)
    except OSError as error:
        raise CheckpointUnreadable(partition.path, f"it can't be read ({error.strerror})", MEND_CORRUPT) from None
    if index >= 0:
        partition.check_chunk(index, buffer[:nbytes])
    return buffer[:nbytes]


async def pull_checkpoint(
    url: str,
    store_dir: Path,
    *,
    parallel: int = PARALLEL_DEFAULT,
    limits: FetchLimits | None = None,
    endpoint: str | None = None,
    on_progress: OnProgress = _ignored,
) -> Transferred:
    """Copy the checkpoint at ``url`` into ``store_dir`` with up to ``parallel`` concurrent requests.

    The checkpoint's name is the URL's last component. An interrupted pull resumes where it stopped. At most
    ``parallel`` chunks are in memory.

    Raises:
        RemoteError: the remote does not deliver. ConfigError: ``url`` is not the URL of a checkpoint.
        WriterBusy: another process is receiving it. WriteError: another checkpoint has this name.
        DiskFull: it does not fit; nothing of it is kept.
    """
    limits, jitter = limits or StoreConfig(store_dir=store_dir), random.Random()
    remote, name = open_checkpoint_url(url, endpoint=endpoint, redirect_hosts=limits.redirect_hosts)
    raw = await fetch_manifest(remote, name, limits=limits, jitter=jitter)
    manifest = _validated(raw, remote.shown_file(name, MANIFEST_NAME))
    repository = CheckpointRepository(store_dir)
    if await asyncio.to_thread(_is_there, repository.root / name, raw):
        return Transferred(str(repository.root / name), manifest.nbytes, was_there=True)
    staged = await asyncio.to_thread(StagedCheckpoint, repository, name, raw)
    with staged:
        progress = _TransferProgress(on_progress, manifest.nbytes)
        pull = _Pull(remote, limits, jitter, progress)
        try:
            for record in manifest.partitions:
                with await asyncio.to_thread(staged.partition, record.rank) as partition:
                    await pull.run(partition, parallel)
        except DiskFull:
            await asyncio.to_thread(staged.discard)
            raise
        place = await asyncio.to_thread(staged.publish)
    return Transferred(str(place), manifest.nbytes, was_there=False)


def _validated(raw: bytes, shown: str) -> Manifest:
    try:
        return parse_manifest(raw, shown)
    except CheckpointInvalid as error:
        raise RemoteCorrupt(shown, error.problem, "push the checkpoint again") from None


def _is_there(target: Path, raw: bytes) -> bool:
    """Whether a checkpoint with exactly this manifest is already published."""
    try:
        there = read_plain(target / MANIFEST_NAME, MANIFEST_NBYTES_MAX)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointUnreadable(target, f"it can't be read ({error.strerror})", "fix its permissions") from None
    if there != raw:
        raise WriteError(target, "another checkpoint has this name", "remove it (`sllm-vllm rm`) or set a store_dir")
    return True


@dataclass(frozen=True, slots=True)
class _Pull:
    """Fetches the partitions of a checkpoint."""

    remote: Remote
    limits: FetchLimits
    jitter: random.Random
    progress: _TransferProgress

    async def run(self, partition: StagedPartition, parallel: int) -> None:
        """Fetch the missing chunks of a partition, then finish its file."""
        missing, told = partition.missing, partition.partition
        nbytes = sum(told.chunk_range(index)[1] for index in missing)
        self.progress.add(told.record.data_nbytes - nbytes)
        if not partition.is_complete:
            header = await fetch_header(self.remote, told, limits=self.limits, jitter=self.jitter)
            # The pool ends before the file is closed, because a cancelled task does not stop its writer thread.
            with ThreadPoolExecutor(max(1, min(WRITERS_MAX, parallel))) as writers:
                await self._fetch_chunks(partition, missing, parallel, writers=writers)
                await asyncio.get_running_loop().run_in_executor(writers, partition.finish, header)
        self.progress.add(told.record.header_nbytes)

    async def _fetch_chunks(
        self, partition: StagedPartition, missing: Sequence[int], parallel: int, *, writers: ThreadPoolExecutor
    ) -> None:
        left = iter(missing)
        num_tasks = min(parallel, len(missing))
        tasks = [asyncio.create_task(self._work(partition, left, writers)) for _ in range(num_tasks)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, partition: StagedPartition, missing: Iterator[int], writers: ThreadPoolExecutor) -> None:
        """Fetch and write chunks one after another until none is left."""
        loop, told = asyncio.get_running_loop(), partition.partition
        buffer = memoryview(mmap.mmap(-1, told.manifest.chunk_nbytes))  # page-aligned, for O_DIRECT
        for index in missing:
            chunks = range(index, index + 1)
            nbytes = await fetch_span(self.remote, told, chunks, into=buffer, limits=self.limits, jitter=self.jitter)
            await loop.run_in_executor(writers, partition.write, chunks, buffer[:nbytes])
            self.progress.add(nbytes)
