"""Reads ranges of remote files, with retries after network faults: stalls, resets, short answers, flipped bits.

Called by ``transfer.py`` and the daemon. Bytes go directly into the caller's buffer; only one piece at a time is held
in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.core.header import check_header
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.errors import CheckpointCorrupt, CheckpointInvalid, RemoteCorrupt, RemoteRefused, RemoteUnreachable
from sllm_vllm.store.remote import Remote

T = TypeVar("T")

BACKOFF_S = 0.2
BACKOFF_S_MAX = 10.0

_MEND = "push the checkpoint again"


class FetchLimits(Protocol):
    """Limits on retries, waiting and redirects of a fetch. ``StoreConfig`` implements it."""

    @property
    def retries_max(self) -> int:
        """Most attempts after the first, for one range as a whole."""
        ...

    @property
    def stall_s(self) -> float:
        """Timeout for an answer, and for each piece of it."""
        ...

    @property
    def redirect_hosts(self) -> Sequence[str]:
        """Hosts to which a remote may redirect, in addition to its own."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote checkpoint, and its expected size."""

    remote: Remote
    name: str
    path: str
    nbytes: int

    @property
    def shown(self) -> str:
        """The file's URL, for messages."""
        return self.remote.shown_file(self.name, self.path)


async def fetch_manifest(remote: Remote, name: str, *, limits: FetchLimits, jitter: random.Random) -> bytes:
    """Return a checkpoint's manifest, not yet validated.

    Raises:
        RemoteError: as for ``fetch_range``.
    """
    return await _persist(lambda: remote.read_manifest(name, stall_s=limits.stall_s), limits, jitter)


async def fetch_range(
    file: RemoteFile, start: int, into: memoryview, *, limits: FetchLimits, jitter: random.Random
) -> None:
    """Fill ``into`` with the bytes from ``start``. A retry requests only the bytes that are still missing.

    Nothing is written to ``into`` after this returns or raises.

    Raises:
        RemoteMissing: no such file. RemoteCorrupt: the answer's range, file size or number of bytes is wrong.
        RemoteUnreachable: the remote refuses, or every attempt failed.
    """
    await _persist(_Fetch(file, start, into, stall_s=limits.stall_s).attempt, limits, jitter)


async def _persist(attempt: Callable[[], Awaitable[T]], limits: FetchLimits, jitter: random.Random) -> T:
    """Call ``attempt`` until it succeeds, fails for good, or ``retries_max`` is reached. Backs off with full jitter."""
    for number in itertools.count():
        try:
            return await attempt()
        except RemoteRefused:
            raise
        except RemoteUnreachable as error:
            if number >= limits.retries_max:
                problem = f"{error.problem} (attempts: {number + 1})"
                raise RemoteUnreachable(error.path, problem, error.mend) from None
        await asyncio.sleep(jitter.uniform(0, min(BACKOFF_S_MAX, BACKOFF_S * 2.0**number)))
    raise AssertionError


class _Fetch:
    """One range that is being fetched. ``done``: bytes that have arrived."""

    def __init__(self, file: RemoteFile, start: int, into: memoryview, *, stall_s: float) -> None:
        self.done = 0
        self._file = file
        self._start = start
        self._into = np.frombuffer(into, dtype=np.uint8)
        self._stall_s = stall_s

    async def attempt(self) -> None:
        """Request the missing bytes once and store what arrives."""
        nbytes = len(self._into)
        if self.done == nbytes:
            return
        try:
            async with asyncio.timeout(self._stall_s) as deadline:
                stream = await self._file.remote.open_range(
                    self._file.name,
                    self._file.path,
                    start=self._start + self.done,
                    nbytes=nbytes - self.done,
                    file_nbytes=self._file.nbytes,
                )
                async with contextlib.aclosing(stream):
                    async for piece in stream:
                        self._take(piece)
                        deadline.reschedule(asyncio.get_running_loop().time() + self._stall_s)
        except TimeoutError:
            problem = f"it stalls: no data arrived for {self._stall_s:g} s"
            raise RemoteUnreachable(self._file.shown, problem, "try again later") from None
        if self.done < nbytes:
            problem = f"its answer ended at byte {self._start + self.done} of {self._start + nbytes}"
            raise RemoteUnreachable(self._file.shown, problem, "try again later")

    def _take(self, piece: bytes) -> None:
        data = np.frombuffer(piece, dtype=np.uint8)
        if self.done + len(data) > len(self._into):
            raise RemoteCorrupt(self._file.shown, "it sends more bytes than were asked for", _MEND)
        np.copyto(self._into[self.done : self.done + len(data)], data)  # releases the GIL
        self.done += len(data)


async def fetch_span(
    remote: Remote,
    partition: RankPartition,
    chunks: range,
    *,
    into: memoryview,
    limits: FetchLimits,
    jitter: random.Random,
) -> int:
    """Fill ``into`` with consecutive chunks and verify each. A chunk with a wrong checksum is fetched once more.

    Args:
        partition: the partition; its directory must have the name of the remote checkpoint.
        into: buffer with room for the chunks; bytes after them are not changed.

    Returns:
        The number of bytes of the chunks.

    Raises:
        RemoteError: as for ``fetch_range``; also RemoteCorrupt if a chunk differs twice. The content of ``into`` is
            then undefined.
    """
    file = _file_of(remote, partition)
    ranges = [partition.chunk_range(index) for index in chunks]
    if not ranges:
        return 0
    start, nbytes = ranges[0][0], sum(length for _, length in ranges)
    await fetch_range(file, start, into[:nbytes], limits=limits, jitter=jitter)
    for index, (offset, length) in zip(chunks, ranges, strict=True):
        chunk = into[offset - start : offset - start + length]
        if await asyncio.to_thread(_difference, partition, index, chunk) is None:
            continue
        await fetch_range(file, offset, chunk, limits=limits, jitter=jitter)  # the network may have flipped a bit
        if (problem := await asyncio.to_thread(_difference, partition, index, chunk)) is not None:
            raise RemoteCorrupt(file.shown, problem, _MEND)
    return nbytes


async def fetch_header(
    remote: Remote, partition: RankPartition, *, limits: FetchLimits, jitter: random.Random
) -> bytes:
    """Return a partition's header, verified against its checksum and the manifest.

    Raises:
        RemoteError: as for ``fetch_span``.
    """
    file, record = _file_of(remote, partition), partition.record
    raw = bytearray(record.header_nbytes)
    for _ in range(2):
        await fetch_range(file, 0, memoryview(raw), limits=limits, jitter=jitter)
        if checksum(raw) == record.header_checksum:
            break
    else:
        raise RemoteCorrupt(file.shown, "its header differs from its checksum", _MEND)
    try:
        check_header(bytes(raw), record.tensors, file.shown)
    except CheckpointInvalid as error:
        raise RemoteCorrupt(file.shown, error.problem, _MEND) from None
    return bytes(raw)


def _file_of(remote: Remote, partition: RankPartition) -> RemoteFile:
    return RemoteFile(remote, partition.directory.name, partition.record.path, partition.record.nbytes)


def _difference(partition: RankPartition, index: int, chunk: memoryview) -> str | None:
    """Return the problem with a chunk, or None if it matches its checksum."""
    try:
        partition.check_chunk(index, chunk)
    except CheckpointCorrupt as error:
        return error.problem
    return None
