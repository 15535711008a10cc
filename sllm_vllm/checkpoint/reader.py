"""Opens and verifies checkpoints. Follows no link inside one and trusts no size. Called by the loader and the CLI."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.checkpoint.checksum import checksum, digest
from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.core.header import check_header
from sllm_vllm.checkpoint.core.manifest import (
    MANIFEST_NAME,
    PARTITION_DIR,
    Manifest,
    Partition,
    parse_manifest,
)
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointInvalid,
    CheckpointMissing,
    CheckpointUnreadable,
)

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
MEND_CORRUPT = "remove the checkpoint (`sllm-vllm rm`) and convert again"


@dataclass(frozen=True, slots=True)
class RankPartition:
    """One rank's partition of a published checkpoint: its location and expected content. Keeps no file open."""

    directory: Path
    manifest: Manifest
    record: Partition

    @property
    def path(self) -> Path:
        """Path of its data file."""
        return self.directory / self.record.path

    @property
    def content_digest(self) -> str:
        """Digest of its chunk checksums and sizes. Equal digests mean equal data, wherever it is stored."""
        content = [self.manifest.chunk_nbytes, self.record.data_nbytes, self.record.chunks]
        return digest(json.dumps(content).encode())

    def open(self) -> ChunkFile:
        """Open the data file and check that its size matches the manifest.

        Raises:
            CheckpointError: the file is missing, a link, unreadable, or of the wrong size.
        """
        fd = _open_beneath(self.directory, (PARTITION_DIR, self.path.name))
        nbytes = os.fstat(fd).st_size
        if nbytes != self.record.nbytes:
            os.close(fd)
            problem = f"it has {nbytes} bytes, the manifest says {self.record.nbytes}"
            raise CheckpointCorrupt(self.path, problem, MEND_CORRUPT)
        return ChunkFile(fd, str(self.path))

    def check_header(self, file: ChunkFile) -> None:
        """Verify the header against its checksum and the manifest.

        Raises:
            CheckpointCorrupt: the header differs from its checksum.
            CheckpointInvalid: the header differs from the manifest.
            CheckpointUnreadable: the device failed.
        """
        buffer = memoryview(mmap.mmap(-1, self.record.header_nbytes))
        with _read_errors(self.path):
            file.read_into(buffer, 0, self.record.header_nbytes)
        raw = bytes(buffer)
        if checksum(raw) != self.record.header_checksum:
            raise CheckpointCorrupt(self.path, "its header differs from its checksum", MEND_CORRUPT)
        check_header(raw, self.record.tensors, str(self.path))

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Return the offset in the file and the size in bytes of chunk ``index``."""
        start = index * self.manifest.chunk_nbytes
        return self.record.header_nbytes + start, min(self.manifest.chunk_nbytes, self.record.data_nbytes - start)

    def check_chunk(self, index: int, data: memoryview) -> None:
        """Verify a chunk's bytes against its checksum.

        Raises:
            CheckpointCorrupt: they differ; the error names the tensors in the chunk.
        """
        if checksum(data) == self.record.chunks[index]:
            return
        start, end = index * self.manifest.chunk_nbytes, (index + 1) * self.manifest.chunk_nbytes
        names = tuple(t.name for t in self.record.tensors if t.nbytes and t.offset < end and t.end > start)
        shown = ", ".join(repr(name)[:200] for name in names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
        problem = f"chunk {index} differs from its checksum (tensors: {shown})"
        raise CheckpointCorrupt(self.path, problem, MEND_CORRUPT, tensors=names)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint: its directory and its validated manifest. Keeps no file open."""

    path: Path
    manifest: Manifest

    def partition(self, rank: int) -> RankPartition:
        """Return a rank's partition; ``rank`` must be below the layout's ``num_partitions``."""
        return RankPartition(self.path, self.manifest, self.manifest.partitions[rank])


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and validate the manifest in the directory ``path``.

    Raises:
        CheckpointMissing: there is no manifest.
        CheckpointInvalid: the manifest violates FORMAT.md, is a link, or is too large.
        CheckpointUnreadable: the manifest can't be opened or read.
    """
    directory = Path(path)
    fd = _open_beneath(directory, (MANIFEST_NAME,))
    with os.fdopen(fd, "rb") as file, _read_errors(directory / MANIFEST_NAME):
        nbytes = os.fstat(fd).st_size
        if nbytes > MANIFEST_NBYTES_MAX:
            problem = f"{nbytes} bytes is too large for a manifest (at most {MANIFEST_NBYTES_MAX})"
            raise CheckpointInvalid(directory / MANIFEST_NAME, problem, "convert the model again")
        raw = file.read(MANIFEST_NBYTES_MAX + 1)
    return Checkpoint(directory, parse_manifest(raw, str(directory / MANIFEST_NAME)))


def verify_checkpoint(checkpoint: Checkpoint, on_progress: Callable[[int], None] = lambda nbytes: None) -> int:
    """Read every byte of a checkpoint and verify all checksums.

    Args:
        on_progress: called after each header or chunk with its size in bytes.

    Returns:
        The number of bytes read.

    Raises:
        CheckpointError: the first problem found.
    """
    buffer = memoryview(mmap.mmap(-1, checkpoint.manifest.chunk_nbytes))
    for record in checkpoint.manifest.partitions:
        partition = checkpoint.partition(record.rank)
        with partition.open() as file:
            partition.check_header(file)
            on_progress(record.header_nbytes)
            for index in range(len(record.chunks)):
                offset, nbytes = partition.chunk_range(index)
                with _read_errors(partition.path):
                    file.read_into(buffer, offset, nbytes)
                partition.check_chunk(index, buffer[:nbytes])
                on_progress(nbytes)
    return checkpoint.manifest.nbytes


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        mend = "mend the device, or remove and convert again"
        raise CheckpointUnreadable(path, f"it can't be read ({error.strerror})", mend) from None


def _open_beneath(directory: Path, parts: tuple[str, ...]) -> int:
    """Open a regular file below ``directory`` without following links in any component below it."""
    fd = _open_step(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, directory)
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        flags = _OPEN_FLAGS if last else _OPEN_FLAGS | os.O_DIRECTORY
        try:
            step = _open_step(Path(part), flags, directory.joinpath(*parts[: depth + 1]), dir_fd=fd)
        finally:
            os.close(fd)
        fd = step
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointInvalid(directory.joinpath(*parts), "it is not a regular file", "convert the model again")
    return fd


def _open_step(path: Path, flags: int, shown: Path, *, dir_fd: int | None = None) -> int:
    try:
        return os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        raise _open_error(error, shown, dir_fd is not None) from None


def _open_error(error: OSError, shown: Path, inside: bool) -> CheckpointError:
    if error.errno == errno.ENOENT:
        return CheckpointMissing(shown, "there is no such file", "convert the model (`sllm-vllm convert`)")
    if inside and error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CheckpointInvalid(shown, "it is a symbolic link or not a directory: refused", "convert the model again")
    if error.errno == errno.ENOTDIR:
        return CheckpointMissing(shown, "it is not a directory", "give the directory of a checkpoint")
    return CheckpointUnreadable(shown, f"it can't be opened ({error.strerror})", "fix its owner or permissions")
