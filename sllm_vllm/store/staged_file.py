"""Writes checkpoints received from a remote, chunk by chunk in any order, and publishes them once they are complete.

::

    <root>/.staging/.received/<name>/manifest.json                        as received, byte for byte
    <root>/.staging/.received/<name>/partitions/rank-….safetensors.partial   some of the chunks
    <root>/.staging/.received/<name>/partitions/rank-….safetensors           complete, verified and synced

Which chunks a partial file already holds is not recorded, but found out from their checksums. Called from threads by
``transfer.py`` and the daemon's write-behind.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.core.header import build_header
from sllm_vllm.checkpoint.core.manifest import DATA_ALIGNMENT, MANIFEST_NAME, Manifest, parse_manifest
from sllm_vllm.checkpoint.reader import RankPartition
from sllm_vllm.checkpoint.repository import CheckpointRepository, is_legal_name
from sllm_vllm.checkpoint.writer import sync_directory, write_errors, write_file_durably
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import CheckpointCorrupt

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class StagedCheckpoint:
    """A checkpoint that is being received. Owns its lock and its folder: at most one per name on the machine.

    Args:
        raw: the manifest as received.

    Raises:
        CheckpointInvalid: the manifest violates FORMAT.md. WriterBusy: another process is receiving this checkpoint.
        DiskFull: it does not fit; nothing of it is kept. WriteError: the directory can't be written.
    """

    def __init__(self, repository: CheckpointRepository, name: str, raw: bytes) -> None:
        assert is_legal_name(name)
        self.target = repository.root / name
        self.manifest: Manifest = parse_manifest(raw, str(self.target / MANIFEST_NAME))
        self._repository = repository
        self._lock = contextlib.ExitStack()
        self.path = self._lock.enter_context(repository.receiver(name))
        try:
            self._prepare(raw)
        except BaseException:
            self.close()
            raise

    def partition(self, rank: int) -> StagedPartition:
        """Open a rank's file; verified chunks that an earlier process left are kept. Close it before ``publish``."""
        return StagedPartition(self.path, RankPartition(self.target, self.manifest, self.manifest.partitions[rank]))

    def publish(self) -> Path:
        """Publish the checkpoint; all partitions must be finished. Returns its directory.

        Raises:
            WriteError: the directory can't be written.
        """
        for record in self.manifest.partitions:
            assert (self.path / record.path).stat().st_size == record.nbytes
        self._repository.publish_received(self.target.name, self.path)
        return self.target

    def discard(self) -> None:
        """Remove everything received so far, to free space on a full disk."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock. What was received stays, so that another process can resume."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _prepare(self, raw: bytes) -> None:
        manifest = self.path / MANIFEST_NAME
        with write_errors(self.path):
            is_ours = manifest.exists() and read_plain(manifest, MANIFEST_NBYTES_MAX) == raw
            if not is_ours:  # the folder is empty or holds another checkpoint's data
                shutil.rmtree(self.path)
                (self.path / "partitions").mkdir(parents=True)
                try:
                    self._require_space()
                    write_file_durably(manifest, raw)
                except BaseException:
                    self.discard()
                    raise

    def _require_space(self) -> None:
        usage = os.statvfs(self.path)
        if usage.f_bavail * usage.f_frsize < self.manifest.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class StagedPartition:
    """One partition that is being received. Owns its descriptors; several threads may call ``write`` at once.

    Raises:
        DiskFull: it does not fit; its partial file is removed. WriteError: the directory can't be written.
    """

    def __init__(self, directory: Path, partition: RankPartition) -> None:
        self.partition = partition
        self.path = directory / partition.record.path
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._missing = set(range(len(partition.record.chunks)))
        self._changing = threading.Lock()
        self._fd: int | None = None
        self._direct_fd: int | None = None
        with write_errors(self.path):
            self.is_complete = self.path.exists()
            if self.is_complete:
                self._missing.clear()
            else:
                self._open()

    @property
    def missing(self) -> list[int]:
        """Indices of the chunks still missing, ascending."""
        with self._changing:
            return sorted(self._missing)

    def write(self, chunks: range, data: memoryview) -> None:
        """Write consecutive chunks, which the caller has verified.

        Args:
            data: exactly the bytes of the chunks; page-aligned data bypasses the page cache.

        Raises:
            DiskFull: the disk is full; the partial file is removed. WriteError: the device failed.
        """
        ranges = [self.partition.chunk_range(index) for index in chunks]
        if len(data) != sum(nbytes for _, nbytes in ranges):
            raise ValueError(f"{len(data)} bytes are not chunks {chunks}")
        if ranges:
            self._write(data, ranges[0][0])
        with self._changing:
            self._missing.difference_update(chunks)

    def finish(self, header: bytes | None = None) -> None:
        """Write the header, make the file durable and rename it to its final name. All chunks must be written.

        Args:
            header: the header as received; None to build it from the manifest.

        Raises:
            CheckpointCorrupt: the header does not match its checksum in the manifest. WriteError: as for ``write``.
        """
        if self.is_complete:
            return
        if self._missing or self._fd is None:
            raise ValueError(f"{self.path}: {len(self._missing)} chunks are missing, or it is closed")
        record = self.partition.record
        raw = build_header(record.tensors) if header is None else header
        if len(raw) != record.header_nbytes or checksum(raw) != record.header_checksum:
            raise CheckpointCorrupt(self.partition.path, "its header differs from its checksum", "pull the checkpoint")
        self._write(memoryview(raw), 0)
        with self._removed_on_failure():
            os.ftruncate(self._fd, record.nbytes)
            os.fsync(self._fd)
            os.rename(self._partial, self.path)
            sync_directory(self.path.parent)
        self.is_complete = True

    def close(self) -> None:
        """Close the file; its chunks stay, so that receiving can resume later. No ``write`` may be running."""
        for fd in (self._fd, self._direct_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._direct_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        nbytes = self.partition.record.nbytes
        try:
            self._fd = os.open(self._partial, _FLAGS | os.O_CREAT, 0o644)
            was_begun = os.fstat(self._fd).st_size == nbytes
            with self._removed_on_failure():
                _allocate(self._fd, nbytes)
            with contextlib.suppress(OSError):  # the file system has no O_DIRECT
                self._direct_fd = os.open(self._partial, _FLAGS | os.O_DIRECT)
            if was_begun:
                self._keep_sound_chunks()
        except BaseException:
            self.close()
            raise

    def _keep_sound_chunks(self) -> None:
        assert self._fd is not None
        buffer = memoryview(mmap.mmap(-1, self.partition.manifest.chunk_nbytes))
        for index in sorted(self._missing):
            offset, nbytes = self.partition.chunk_range(index)
            with contextlib.suppress(CheckpointCorrupt):
                if os.preadv(self._fd, [buffer[:nbytes]], offset) == nbytes:
                    self.partition.check_chunk(index, buffer[:nbytes])
                    self._missing.discard(index)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write(self, data: memoryview, offset: int) -> None:
        if self._fd is None:
            raise ValueError(f"{self.path}: it is closed")
        with self._removed_on_failure():
            done = self._write_direct(data, offset)
            while done < len(data):  # one call may write less
                done += os.pwrite(self._fd, data[done:], offset + done)

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Write the leading multiple of 4096 bytes with O_DIRECT, if possible. Returns the bytes written."""
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data if data else 0
        nbytes = len(data) - len(data) % DATA_ALIGNMENT
        if self._direct_fd is None or not nbytes or offset % DATA_ALIGNMENT or address % DATA_ALIGNMENT:
            return 0
        try:
            return os.pwrite(self._direct_fd, data[:nbytes], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0

    @contextlib.contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        with write_errors(self.path):
            try:
                yield
            except OSError:
                with contextlib.suppress(OSError):
                    self._partial.unlink()
                raise


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the file's space now, so that a full disk is detected before anything is fetched."""
    os.ftruncate(fd, nbytes)
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
