"""Opening and verifying a checkpoint. Follows no link and trusts no size; called by the loader and the CLI."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.core.header import check_header
from sllm_vllm.checkpoint.core.manifest import (
    DATA_ALIGNMENT,
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
from sllm_vllm.units import round_up

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
MEND_CORRUPT = "remove the checkpoint (`sllm-vllm rm`) and convert again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint: its directory and its validated manifest. Holds nothing open."""

    path: Path
    manifest: Manifest

    def open_partition(self, rank: int) -> ChunkFile:
        """Open a rank's partition, after holding its size against the manifest.

        Raises:
            CheckpointError: it is missing, a link, not readable, or of another size.
        """
        partition = self.manifest.partitions[rank]
        path = self.path / partition.path
        fd = _open_beneath(self.path, (PARTITION_DIR, path.name))
        nbytes = os.fstat(fd).st_size
        if nbytes != partition.nbytes:
            os.close(fd)
            raise CheckpointCorrupt(path, f"it has {nbytes} bytes, the manifest says {partition.nbytes}", MEND_CORRUPT)
        return ChunkFile(fd, str(path))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and validate the manifest in the directory ``path``.

    Raises:
        CheckpointMissing: there is none.
        CheckpointInvalid: it breaks FORMAT.md, is a link, or is too large.
        CheckpointUnreadable: the system refuses.
    """
    directory = Path(path)
    fd = _open_beneath(directory, (MANIFEST_NAME,))
    with os.fdopen(fd, "rb") as file:
        nbytes = os.fstat(fd).st_size
        if nbytes > MANIFEST_NBYTES_MAX:
            problem = f"{nbytes} bytes is too large for a manifest (at most {MANIFEST_NBYTES_MAX})"
            raise CheckpointInvalid(directory / MANIFEST_NAME, problem, "convert the model again")
        raw = file.read(MANIFEST_NBYTES_MAX + 1)
    return Checkpoint(directory, parse_manifest(raw, str(directory / MANIFEST_NAME)))


def read_header(file: ChunkFile, partition: Partition) -> None:
    """Hold the partition's header against its checksum and the manifest.

    Raises:
        CheckpointCorrupt: its bytes are not those that were written.
        CheckpointInvalid: it says anything else than the manifest.
    """
    buffer = memoryview(mmap.mmap(-1, round_up(partition.header_nbytes, DATA_ALIGNMENT)))
    file.read_into(buffer, 0, partition.header_nbytes)
    raw = bytes(buffer[: partition.header_nbytes])
    if checksum(raw) != partition.header_checksum:
        raise CheckpointCorrupt(file.path, "its header differs from its checksum", MEND_CORRUPT)
    check_header(raw, partition.tensors, file.path)


def chunk_range(manifest: Manifest, partition: Partition, index: int) -> tuple[int, int]:
    """Offset in the file and bytes of chunk ``index``."""
    start = index * manifest.chunk_nbytes
    return partition.header_nbytes + start, min(manifest.chunk_nbytes, partition.data_nbytes - start)


def corrupt_chunk(path: str, manifest: Manifest, partition: Partition, index: int) -> CheckpointCorrupt:
    """The error for a chunk that differs from its checksum; it names the tensors that lie in it."""
    start, end = index * manifest.chunk_nbytes, (index + 1) * manifest.chunk_nbytes
    names = tuple(t.name for t in partition.tensors if t.offset < end and t.end > start)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    problem = f"chunk {index} differs from its checksum (tensors: {shown})"
    return CheckpointCorrupt(path, problem, MEND_CORRUPT, tensors=names)


def verify_checkpoint(checkpoint: Checkpoint, on_progress: Callable[[int], None] = lambda nbytes: None) -> int:
    """Read every byte and hold it against its checksum; calls ``on_progress`` with the bytes of each step.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    manifest = checkpoint.manifest
    buffer = memoryview(mmap.mmap(-1, manifest.chunk_nbytes))
    for partition in manifest.partitions:
        with checkpoint.open_partition(partition.rank) as file:
            read_header(file, partition)
            on_progress(partition.header_nbytes)
            for index, wanted in enumerate(partition.chunks):
                offset, nbytes = chunk_range(manifest, partition, index)
                file.read_into(buffer, offset, nbytes)
                if checksum(buffer[:nbytes]) != wanted:
                    raise corrupt_chunk(file.path, manifest, partition, index)
                on_progress(nbytes)
    return manifest.nbytes


def _open_beneath(directory: Path, parts: tuple[str, ...]) -> int:
    """Open a regular file below ``directory``, following no link on the way down from it."""
    fd = _open_step(directory, None, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, directory)
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        flags = _OPEN_FLAGS if last else _OPEN_FLAGS | os.O_DIRECTORY
        try:
            step = _open_step(Path(part), fd, flags, directory.joinpath(*parts[: depth + 1]))
        finally:
            os.close(fd)
        fd = step
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointInvalid(directory.joinpath(*parts), "it is no regular file", "convert the model again")
    return fd


def _open_step(path: Path, dir_fd: int | None, flags: int, shown: Path) -> int:
    try:
        return os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        raise _open_error(error, shown, dir_fd is not None) from None


def _open_error(error: OSError, shown: Path, inside: bool) -> CheckpointError:
    if error.errno == errno.ENOENT:
        return CheckpointMissing(shown, "there is no such file", "convert the model (`sllm-vllm convert`)")
    if inside and error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CheckpointInvalid(shown, "a symbolic link in a checkpoint is refused", "convert the model again")
    if error.errno == errno.ENOTDIR:
        return CheckpointMissing(shown, "it is no directory", "give the directory of a checkpoint")
    return CheckpointUnreadable(shown, f"it can't be opened ({error.strerror})", "mend its owner or permissions")
