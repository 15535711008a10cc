"""Writes one rank's partition so that a crash at any point never leaves a half-written file under its final name.

The bytes are written to a file named ``….partial``, synced, and then renamed. A small JSON record of the partition is
then written in the same way. ``repository.py`` publishes a checkpoint once the records of all ranks exist.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from sllm_vllm.checkpoint.checksum import RunningChecksum, checksum
from sllm_vllm.checkpoint.core.header import build_header
from sllm_vllm.checkpoint.core.layout import TensorSpec, plan_records
from sllm_vllm.checkpoint.core.manifest import Partition, TensorRecord, first_problem, partition_path
from sllm_vllm.errors import DiskFull, NotConvertible, WriteError

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class TensorData(Protocol):
    """A tensor that can be written."""

    @property
    def spec(self) -> TensorSpec:
        """The tensor's name, dtype, shape and size."""
        ...

    def pieces(self, nbytes_max: int) -> Iterator[memoryview]:
        """Yield its bytes in row-major order, at most ``nbytes_max`` at once; a piece is valid until the next one."""
        ...


@dataclass(frozen=True, slots=True)
class WrittenPartition:
    """A partition that is written but not yet durable. ``sync`` makes it durable and gives it its final name."""

    partition: Partition
    path: Path

    def sync(self) -> None:
        """Flush the bytes to the device, then rename the file. May take long; may run on another thread.

        Raises:
            WriteError: the device failed; the partial file is removed.
        """
        with write_errors(self.path), _removed_on_failure(_partial(self.path)):
            fd = os.open(_partial(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(_partial(self.path), self.path)
            sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove the partial file; called instead of ``sync``."""
        with contextlib.suppress(OSError):
            _partial(self.path).unlink()


def write_partition(
    directory: Path,
    rank: int,
    tensors: Sequence[TensorData],
    *,
    chunk_nbytes: int,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> WrittenPartition:
    """Write a rank's partition below ``directory`` under its temporary name.

    At most one writer per rank may run at a time; the caller ensures it.

    Raises:
        NotConvertible: the manifest format can't describe these tensors; nothing was written.
        DiskFull: the partition does not fit; the partial file is removed.
        WriteError: the directory can't be written.
    """
    path = directory / partition_path(rank)
    partition, header = _plan_partition(path, rank, tensors)
    by_name = {tensor.spec.name: tensor for tensor in tensors}
    with write_errors(path), _removed_on_failure(_partial(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).unlink(missing_ok=True)  # left by a killed writer; free its space before checking for space
        _require_space(path, partition.nbytes)
        chunks = _write_file(
            path,
            header,
            ((by_name[record.name], record) for record in partition.tensors),
            chunk_nbytes=chunk_nbytes,
            on_progress=on_progress,
        )
    return WrittenPartition(partition.model_copy(update={"chunks": chunks}), path)


def write_file_durably(path: Path, content: bytes) -> None:
    """Replace a small file atomically and durably: a reader finds either the old content or the new one.

    Raises:
        WriteError: the directory can't be written or is full.
    """
    with write_errors(path), _removed_on_failure(_partial(path)):
        _partial(path).unlink(missing_ok=True)
        fd = os.open(_partial(path), _NEW_FILE, 0o644)
        try:
            _write_all(fd, memoryview(content), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(_partial(path), path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory, which makes renames inside it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``WriteError`` that names ``path`` and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, "no space is left on the device", "free some or set another store_dir") from None
        problem = f"it can't be written ({error.strerror})"
        raise WriteError(path, problem, "make the store writable or set another store_dir") from None


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _plan_partition(path: Path, rank: int, tensors: Sequence[TensorData]) -> tuple[Partition, bytes]:
    """Return the partition, with its list of chunk checksums still empty, and its header."""
    try:
        records = plan_records([tensor.spec for tensor in tensors])
        header = build_header(records)
        partition = Partition(
            rank=rank,
            path=partition_path(rank),
            nbytes=len(header) + (records[-1].end if records else 0),
            header_nbytes=len(header),
            header_checksum=checksum(header),
            tensors=records,
            chunks=[],
        )
    except ValidationError as error:
        raise NotConvertible(path, first_problem(error), "the stock loader is used each time") from None
    return partition, header


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _require_space(path: Path, nbytes: int) -> None:
    usage = os.statvfs(path.parent)
    if usage.f_bavail * usage.f_frsize < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_file(
    path: Path,
    header: bytes,
    tensors: Iterator[tuple[TensorData, TensorRecord]],
    *,
    chunk_nbytes: int,
    on_progress: Callable[[int], None],
) -> list[str]:
    """Write header and data. Returns the checksum of every chunk."""
    fd = os.open(_partial(path), _NEW_FILE, 0o644)
    try:
        _write_all(fd, memoryview(header), 0)
        chunks, running, position = [], RunningChecksum(), 0
        for tensor, record in tensors:
            for piece in tensor.pieces(chunk_nbytes):
                while piece:
                    step = piece[: chunk_nbytes - position % chunk_nbytes]
                    running.update(step)
                    _write_all(fd, step, len(header) + position)
                    position += len(step)
                    on_progress(len(step))
                    piece = piece[len(step) :]
                    if position % chunk_nbytes == 0:
                        chunks.append(running.finish())
            if position != record.end:
                raise ValueError(f"{record.name}: gave {position - record.offset} bytes of {record.nbytes}")
        if position % chunk_nbytes:
            chunks.append(running.finish())
        return chunks
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    """Call ``pwrite`` until everything is written: one call may write less, on a full disk or above 2 GiB."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
