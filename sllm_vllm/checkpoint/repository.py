"""A directory of checkpoints on a local disk: finds, stages, publishes, lists and removes them.

::

    <root>/<name>/                     a published checkpoint; the name ends in the digest of its key
    <root>/.staging/<name>/            being written: partitions, and one record per finished rank
    <root>/.locks/                     one writer per rank, one publisher; locks are released when their process ends
    <root>/.rejected/<name>/           checkpoints that could not be used, kept for diagnosis
    <root>/.trash/                     being removed; the next removal deletes what a killed removal left
    <root>/.used/<name>                empty file; its mtime is when the checkpoint was last loaded
    <root>/.verified/                  marks of partitions that were verified since they last changed

Ranks write independently and need not start together. The rank that finishes last publishes. A conversion that was
killed therefore resumes rank by rank: ranks with a record are skipped. A rank's record exists only while its partition
is complete: it is written after the partition and removed before it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_vllm import __version__
from sllm_vllm.checkpoint.checksum import digest
from sllm_vllm.checkpoint.core.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Layout,
    Manifest,
    Partition,
    Source,
    num_chunks,
    num_marks,
    partition_path,
)
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from sllm_vllm.checkpoint.writer import WrittenPartition, sync_directory, write_errors, write_file_durably
from sllm_vllm.config import MANIFEST_MARKS_MAX, MANIFEST_NBYTES_MAX
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import CheckpointError, CheckpointMissing, CheckpointUnreadable, NotConvertible, WriterBusy
from sllm_vllm.units import KIB

_LOCKS = ".locks"
_REJECTED = ".rejected"
_STAGING = ".staging"
_RECORD_NBYTES_MAX = 4 * MANIFEST_NBYTES_MAX
"""Of one rank; above what a manifest may have, so that publishing says why it is refused."""
_TRASH = ".trash"
_USED = ".used"


_LAYOUT_DIGITS, _KEY_DIGITS = 6, 14
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


def is_legal_name(name: str) -> bool:
    """Whether ``name`` is allowed for a checkpoint: one path component, not hidden."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class CheckpointKey:
    """What a checkpoint was made from and for. Equal keys mean equal bytes."""

    source: Source
    layout: Layout

    @property
    def name(self) -> str:
        """Name of its directory: a readable part of the model's name, then digests of the layout and the whole key."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "--".join(Path(self.source.model).parts[-2:]))[-60:].strip(".-")
        parts = [FORMAT_VERSION, self.source.fingerprint, self.layout.model_dump()]
        text = json.dumps(parts, sort_keys=True)
        return f"{slug or 'model'}-{_layout_digits(self.layout)}{digest(text.encode())[:_KEY_DIGITS]}"


def _layout_digits(layout: Layout) -> str:
    """Return the digits of a checkpoint's name that all checkpoints with this layout share."""
    return digest(json.dumps(layout.model_dump(), sort_keys=True).encode())[:_LAYOUT_DIGITS]


class CheckpointRepository:
    """The checkpoints below one root. Holds no state of its own; everything is read from the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: CheckpointKey) -> Checkpoint:
        """Return the published checkpoint of ``key``.

        Raises:
            CheckpointMissing: there is none. CheckpointError: it exists but can't be used.
        """
        return open_checkpoint(self.root / key.name)

    def may_have(self, layout: Layout) -> bool:
        """Whether the repository may hold a checkpoint for ``layout``, judged only by directory names."""
        digits, place = _layout_digits(layout), slice(-_LAYOUT_DIGITS - _KEY_DIGITS, -_KEY_DIGITS)
        try:
            return any(name[place] == digits for name in os.listdir(self.root))
        except OSError:
            return False

    def list(self) -> list[Checkpoint | CheckpointError]:
        """Return every published checkpoint, sorted by name; for one that can't be read, its error.

        Raises:
            CheckpointUnreadable: the root directory can't be read.
        """
        try:
            names = sorted(name for name in os.listdir(self.root) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            problem = f"it can't be listed ({error.strerror})"
            raise CheckpointUnreadable(self.root, problem, "fix its owner or permissions") from None
        return [found for name in names if (found := self._open_or_error(name)) is not None]

    def _open_or_error(self, name: str) -> Checkpoint | CheckpointError | None:
        try:
            return open_checkpoint(self.root / name)
        except CheckpointMissing:
            return None
        except CheckpointError as error:
            return error

    def note_use(self, name: str) -> None:
        """Record that a checkpoint is being loaded. Does nothing if the directory can't be written."""
        with contextlib.suppress(OSError):
            (self._private_directory(_USED) / name).touch()

    def last_use_s(self, name: str) -> float | None:
        """Return when a checkpoint was last loaded, in seconds since the epoch; None if no use was recorded."""
        try:
            return (self.root / _USED / name).stat().st_mtime
        except OSError:
            return None

    def remove(self, name: str) -> int:
        """Remove a checkpoint; engines that have it open can still read it. Returns the bytes freed.

        Symbolic links and directories without a manifest are never removed, because this class did not create them.

        Raises:
            CheckpointMissing: there is no checkpoint of this name. WriteError: the directory can't be written.
        """
        path = self.root / name
        with write_errors(path):
            if Path(name).name != name or name.startswith(".") or not _may_remove(path):
                raise CheckpointMissing(path, "there is no such checkpoint", "see `sllm-vllm list`")
            nbytes = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
            locks, trash = self._private_directory(_LOCKS), self._private_directory(_TRASH)
        with _locked(locks / _TRASH, blocking=True), write_errors(path):
            doomed = tempfile.mkdtemp(dir=trash)
            os.rename(path, Path(doomed) / name)
            sync_directory(self.root)
            shutil.rmtree(doomed)
            for leftover in trash.iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
            (self.root / _USED / name).unlink(missing_ok=True)
        return nbytes

    def set_aside(self, name: str) -> Path:
        """Move an unusable checkpoint to ``.rejected``, so that it is converted again. Returns its new path.

        Replaces an older rejected checkpoint of the same name. Every rank of an engine may call this; it does nothing
        if the checkpoint was already moved.

        Raises:
            WriteError: the directory can't be written.
        """
        path = self.root / name
        with write_errors(path):
            locks = self._private_directory(_LOCKS)
        with _locked(locks / name, blocking=True), write_errors(path):
            return _set_aside(path)

    def require_writable(self) -> None:
        """Check, before costly work, that checkpoints can be written here.

        Raises:
            WriteError: the directory can't be written.
        """
        with write_errors(self.root):
            if not os.access(self._private_directory(_STAGING), os.W_OK):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def stage(self, key: CheckpointKey, chunk_nbytes: int) -> Staging:
        """Return a staging area for writing ``key``'s partitions.

        Raises:
            WriteError: the directory can't be written.
        """
        with write_errors(self.root):
            path = self._private_directory(_STAGING) / key.name
            locks = self._private_directory(_LOCKS)
        return Staging(key, chunk_nbytes, path, self.root / key.name, locks)

    @contextlib.contextmanager
    def receiver(self, name: str) -> Iterator[Path]:
        """Hold the lock for receiving checkpoint ``name`` from a remote. Yields the folder to write it to.

        The folder is not removed on exit, so that a later call can resume.

        Raises:
            WriterBusy: another process holds the lock. WriteError: the directory can't be written.
        """
        with write_errors(self.root):
            path = self._private_directory(f"{_STAGING}/.received") / name
            locks = self._private_directory(_LOCKS)
        with _locked(locks / f"{name}.receiver", blocking=False):
            with write_errors(path):
                path.mkdir(exist_ok=True)
            yield path

    def publish_received(self, name: str, received: Path) -> bool:
        """Publish a folder that holds a complete, synced checkpoint as ``name``. Called inside ``receiver``.

        Returns:
            True if ``received`` was published; False if another one was published meanwhile and ``received`` removed.

        Raises:
            WriteError: the directory can't be written.
        """
        target = self.root / name
        with _locked(self._private_directory(_LOCKS) / name, blocking=True), write_errors(target):
            if (target / MANIFEST_NAME).exists():
                shutil.rmtree(received, ignore_errors=True)
                return False
            sync_directory(received)
            _set_aside(target)  # anything there has no manifest, as checked above
            os.rename(received, target)
            sync_directory(self.root)
            return True

    def _private_directory(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True, slots=True)
class Staging:
    """A checkpoint that is being written. Any number of processes may hold one for the same key."""

    key: CheckpointKey
    chunk_nbytes: int
    path: Path
    target: Path
    locks: Path

    @contextlib.contextmanager
    def writer(self, rank: int) -> Iterator[bool]:
        """Hold the lock for writing a rank's partition. Yields whether the partition still needs to be written.

        Raises:
            WriterBusy: another process holds the lock. WriteError: the directory can't be written.
        """
        with _locked(self.locks / f"{self.key.name}.rank-{rank}", blocking=False):
            with _locked(self.locks / self.key.name, blocking=True), write_errors(self.path):
                needed = not self._is_published() and self._record(rank) is None
                if needed:  # else another process could publish the old record while its partition is rewritten
                    self._discard(rank)
            yield needed

    def commit(self, written: WrittenPartition) -> None:
        """Make a written partition durable and record it. Called inside ``writer``.

        Raises:
            WriteError: the device failed, or the directory can't be written.
        """
        written.sync()
        record = json.dumps({"chunk_nbytes": self.chunk_nbytes, "partition": written.partition.model_dump()})
        try:
            write_file_durably(self._record_path(written.partition.rank), record.encode())
        except BaseException:
            with contextlib.suppress(OSError):  # free its space: the disk may be full
                written.path.unlink()
            raise

    def publish(self) -> bool:
        """Publish the checkpoint if every rank's partition is recorded. Returns whether it is published now.

        Raises:
            NotConvertible: its manifest would be too large. WriteError: the directory can't be written.
        """
        with _locked(self.locks / self.key.name, blocking=True), write_errors(self.target):
            if self._is_published():
                shutil.rmtree(self.path, ignore_errors=True)
                return True
            records = [self._record(rank) for rank in range(self.key.layout.num_partitions)]
            partitions = [record for record in records if record is not None]
            if len(partitions) < len(records):
                return False
            manifest = Manifest(
                created_by=f"sllm-vllm {__version__}",
                source=self.key.source,
                layout=self.key.layout,
                chunk_nbytes=self.chunk_nbytes,
                partitions=partitions,
            )
            self._publish(manifest)
            return True

    def _publish(self, manifest: Manifest) -> None:
        content = manifest.model_dump_json().encode()
        if len(content) > MANIFEST_NBYTES_MAX or num_marks(content) > MANIFEST_MARKS_MAX:
            problem = f"its manifest would have {len(content)} bytes, and too many tensors or chunks"
            raise NotConvertible(self.target, problem, "set larger chunk_bytes")
        write_file_durably(self.path / MANIFEST_NAME, content)
        for partition in manifest.partitions:
            self._record_path(partition.rank).unlink()
        sync_directory(self.path)
        _set_aside(self.target)  # anything there has no manifest; the caller checked
        os.rename(self.path, self.target)
        sync_directory(self.target.parent)

    def _is_published(self) -> bool:
        return (self.target / MANIFEST_NAME).exists()

    def _discard(self, rank: int) -> None:
        for path in (self._record_path(rank), self.path / partition_path(rank)):
            path.unlink(missing_ok=True)

    def _record_path(self, rank: int) -> Path:
        return self.path / f"rank-{rank:05d}.json"

    def _record(self, rank: int) -> Partition | None:
        """Return the record of a rank's finished partition if it exists, is valid and has our chunk size, else None."""
        try:
            value = json.loads(read_plain(self._record_path(rank), _RECORD_NBYTES_MAX))
            partition = Partition.model_validate(value["partition"])
            complete = (self.path / partition.path).stat().st_size == partition.nbytes
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        fits = len(partition.chunks) == num_chunks(partition.data_nbytes, self.chunk_nbytes)
        same = value.get("chunk_nbytes") == self.chunk_nbytes and partition.rank == rank
        return partition if complete and fits and same else None


class VerifiedMarks:
    """Marks on partitions that were read completely and verified. A mark is void once the file changes in any way."""

    def __init__(self, root: Path) -> None:
        self._directory = root / ".verified"

    def is_marked(self, file: Path) -> bool:
        """Whether ``file`` was verified after its last change."""
        try:
            return read_plain(self._directory / _mark_name(file), KIB).decode() == _identity(file.stat())
        except (OSError, UnicodeDecodeError):
            return False

    def mark(self, file: Path, status: os.stat_result) -> bool:
        """Mark ``file`` as verified. Returns False if the mark can't be written; the file is then verified again.

        Args:
            status: ``stat`` of the file that was read, taken when it was opened, as its name may now belong to
                another file.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            mark = self._directory / _mark_name(file)
            temporary = mark.with_name(f"{mark.name}.{os.getpid()}")
            temporary.write_text(_identity(status))
            os.rename(temporary, mark)
        except OSError:
            return False
        return True


def _may_remove(path: Path) -> bool:
    return not path.is_symlink() and os.path.lexists(path / MANIFEST_NAME)


def _set_aside(path: Path) -> Path:
    rejected = path.parent / _REJECTED / path.name
    if os.path.lexists(path):
        rejected.parent.mkdir(exist_ok=True)
        shutil.rmtree(rejected, ignore_errors=True)
        os.rename(path, rejected)
        sync_directory(path.parent)
    return rejected


def _mark_name(file: Path) -> str:
    return digest(os.fsencode(file.resolve()))


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


@contextlib.contextmanager
def _locked(path: Path, *, blocking: bool) -> Iterator[None]:
    """Hold an advisory file lock, which the kernel releases when the process ends for any reason."""
    with write_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with write_errors(path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError:
                raise WriterBusy(path, "another process is writing this checkpoint", "wait for it") from None
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing does not unlock while a forked child still has the descriptor
        os.close(fd)
