"""Remembers the content of source weights on this machine: files are read once, later checks only compare ``stat``.

::

    <root>/.sources/<digest of a path>.json    one record per model directory, or per repository in a Hub cache

A record maps the state of each file (size, times, inode, device) to the content that the file had in that state. An
entry is trusted only if the file had not been written to in the two seconds before it was read: a later write within
the same tick of the file system's clock could leave the state unchanged.

A file that a Hub cache names by its hash is not read when it is seen for the first time, unless it was modified after
its link was made. It is read once its state has changed, because it may have been overwritten in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sllm_vllm.checkpoint.checksum import digest
from sllm_vllm.checkpoint.core.manifest import SourceFileRecord
from sllm_vllm.checkpoint.fingerprint import (
    FileState,
    SourceFile,
    fingerprint_of,
    hub_snapshot_of,
    read_digests,
    read_samples,
    record_of,
)
from sllm_vllm.config import SOURCE_RECORD_NBYTES_MAX
from sllm_vllm.daemon.plain_file import read_plain

Effort = Literal["unknown", "named", "all"]

_SOURCES = ".sources"
_SETTLED_NS = 2_000_000_000
"""Timestamp resolution of FAT, the coarsest of the file systems in use."""
_AHEAD_NS = 86_400 * 1_000_000_000
"""A timestamp further in the future than this was set explicitly or by a wrong clock, and means no recent write."""
_PATHS_MAX = 20_000
_SIGHTINGS_MAX = 32
"""More than one per file, because nodes that share a store see one path with different inodes and devices."""


class _Sighting(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    state: Annotated[list[int], Field(min_length=5, max_length=5)]
    samples: str | None
    digest: str | None
    """None if the file had just been written to, so that its state does not identify its content."""
    is_read: bool
    """False if the digest was taken from the file's name in a Hub cache."""


class _Folder(BaseModel):
    """The content of a model's directory when all of its files were last identified."""

    model_config = ConfigDict(frozen=True, strict=True)

    fingerprint: str
    contents: dict[str, str]


class _SightingsRecord(BaseModel):
    """``sightings`` are keyed by a file's real path, because snapshots in a Hub cache share files."""

    model_config = ConfigDict(frozen=True, strict=True)

    is_whole: bool = True
    """False if sightings were lost, so that a file without a sighting may have been seen before."""
    sightings: dict[str, list[_Sighting]] = {}
    folders: dict[str, _Folder] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """The content of a model's source files. ``changed``: files that changed since they were last identified."""

    files: tuple[SourceFileRecord, ...]
    changed: tuple[str, ...] = ()
    nbytes_read: int = 0
    seconds: float = 0.0

    @property
    def fingerprint(self) -> str:
        """Digest of the content of all files, the same on every machine."""
        return fingerprint_of(self.files)


@dataclass(slots=True)
class _Look:
    """The result of checking a directory: which files are known, and which must be read."""

    known: dict[str, str] = field(default_factory=dict)
    believed: set[str] = field(default_factory=set)
    """Names of the known files whose content comes from an earlier sighting."""
    unknown: list[SourceFile] = field(default_factory=list)


class SourceRecords:
    """The records below one root. Holds no state. If records can't be written, sources are read at every check."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def known(self, directory: Path, files: Sequence[SourceFile]) -> Identified | None:
        """Return the content of ``files`` if no weight file must be read for it, else None.

        Raises:
            ConfigError: a file can't be read.
        """
        record = self._read(directory)
        look = _look(files, record)
        if any(file.is_weights for file in look.unknown):
            return None
        return self._identified(directory, files, look=look, record=record)

    def identify(self, directory: Path, files: Sequence[SourceFile], *, effort: Effort = "unknown") -> Identified:
        """Return the content of ``files``, reading those that must be read.

        Processes that call this for the same directory at the same time run one after another.

        Args:
            effort: which files to read. ``unknown``: those whose content is unknown; ``named``: also those known only
                by their name in a Hub cache; ``all``: every file.

        Raises:
            ConfigError: a file can't be read, or changed while it was read.
        """
        with self._one_reader(directory):
            record = self._read(directory)
            look = _Look(unknown=list(files)) if effort == "all" else _look(files, record, effort=effort)
            return self._identified(directory, files, look=look, record=record)

    def folders(self) -> dict[Path, str]:
        """Return all known model directories with the fingerprint that each had when it was last identified."""
        found = {}
        with contextlib.suppress(OSError):
            for path in sorted((self._root / _SOURCES).glob("*.json")):
                found.update({Path(name): folder.fingerprint for name, folder in _parse(path).folders.items()})
        return found

    def _identified(
        self, directory: Path, files: Sequence[SourceFile], *, look: _Look, record: _SightingsRecord | None
    ) -> Identified:
        began_ns, start = time.time_ns(), time.perf_counter()
        digests = read_digests(look.unknown) if look.unknown else []
        read = dict(zip((file.name for file in look.unknown), digests, strict=True))
        contents = {file.name: read.get(file.name) or look.known[file.name] for file in files}
        folder = str(directory.resolve())
        identified = Identified(
            files=tuple(record_of(file, contents[file.name]) for file in files),
            changed=_changed(contents, record.folders.get(folder) if record is not None else None),
            nbytes_read=sum(file.state.nbytes for file in look.unknown),
            seconds=time.perf_counter() - start,
        )
        old = record or _SightingsRecord()
        seen = {}
        for file in files:
            if file.is_weights and file.name not in look.believed:
                now = _sighting(file, contents[file.name], began_ns=began_ns, is_read=file.name in read)
                seen[file.real] = _merged(now, old.sightings.get(file.real, []))
        held = _Folder(fingerprint=identified.fingerprint, contents=contents)
        self._write(directory, record, _updated(old, sightings=seen, folders={folder: held}))
        return identified

    def _path(self, directory: Path) -> Path:
        place = directory.resolve()
        if hub_snapshot_of(place) is not None:
            place = place.parent.parent
        return self._root / _SOURCES / f"{digest(os.fsencode(place))}.json"

    def _read(self, directory: Path) -> _SightingsRecord | None:
        """Return the record for a directory; None if there is none."""
        path = self._path(directory)
        return _parse(path) if os.path.lexists(path) else None

    def _write(self, directory: Path, old: _SightingsRecord | None, new: _SightingsRecord) -> None:
        path = self._path(directory)
        if new == old:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
            temporary.write_text(new.model_dump_json())
            os.rename(temporary, path)

    @contextlib.contextmanager
    def _one_reader(self, directory: Path) -> Iterator[None]:
        path = self._path(directory).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        try:
            with contextlib.suppress(OSError):  # the file system has no locks: each process reads the files itself
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # closing does not unlock while a forked child still has the descriptor
            os.close(fd)


def _parse(path: Path) -> _SightingsRecord:
    """Read a record. Returns an empty one with ``is_whole`` false if it can't be read or is invalid."""
    try:
        return _SightingsRecord.model_validate_json(read_plain(path, SOURCE_RECORD_NBYTES_MAX))
    except (OSError, ValidationError):
        pass
    return _SightingsRecord(is_whole=False)


def _updated(
    old: _SightingsRecord, *, sightings: dict[str, list[_Sighting]], folders: dict[str, _Folder]
) -> _SightingsRecord:
    """Return ``old`` with the new sightings and folders added.

    Drops folders that no longer exist, and all old sightings once there are more than ``_PATHS_MAX`` paths.
    """
    merged, is_whole = old.sightings | sightings, old.is_whole
    if len(merged) > _PATHS_MAX:
        merged, is_whole = sightings, False
    kept = {name: folder for name, folder in old.folders.items() if os.path.isdir(name)}
    return _SightingsRecord(is_whole=is_whole, sightings=merged, folders=kept | folders)


def _look(files: Sequence[SourceFile], record: _SightingsRecord | None, *, effort: Effort = "unknown") -> _Look:
    look = _Look()
    for file in files:
        seen = record.sightings.get(file.real) if record is not None else None
        trusts_names = effort == "unknown"
        if file.is_weights and (content := _recall(file, seen or (), trusts_names=trusts_names)) is not None:
            look.believed.add(file.name)
            look.known[file.name] = content
        elif trusts_names and _is_first_sight(file, seen, record):
            assert file.blob is not None
            look.known[file.name] = file.blob
        else:
            look.unknown.append(file)
    return look


def _is_first_sight(file: SourceFile, seen: object, record: _SightingsRecord | None) -> bool:
    """Whether a file was never seen before and its name in a Hub cache can be trusted."""
    is_named = file.is_weights and file.blob is not None and file.is_as_downloaded
    return is_named and seen is None and (record is None or record.is_whole)


def _recall(file: SourceFile, seen: Sequence[_Sighting], *, trusts_names: bool) -> str | None:
    """Return the recorded content of a file in its current state; None if there is none or the samples differ."""
    for sighting in seen:
        is_same = file.state.proves_same_as(FileState(*sighting.state))
        if is_same and sighting.digest is not None and (trusts_names or sighting.is_read):
            return sighting.digest if sighting.samples == read_samples(file) else None
    return None


def _sighting(file: SourceFile, content: str, *, began_ns: int, is_read: bool) -> _Sighting:
    """Make a sighting of a file. ``began_ns``: when reading began, or when the state was taken."""
    ages_ns = (began_ns - file.state.mtime_ns, began_ns - file.state.ctime_ns)
    is_settled = not any(-_AHEAD_NS <= age_ns <= _SETTLED_NS for age_ns in ages_ns)
    return _Sighting(
        state=list(file.state),
        samples=read_samples(file) if is_settled else None,
        digest=content if is_settled else None,
        is_read=is_read,
    )


def _merged(now: _Sighting, before: Sequence[_Sighting]) -> list[_Sighting]:
    """Return a file's sightings, newest first. ``is_read`` stays true once the content was read in the same state."""
    was_read = any(s.state == now.state and s.digest == now.digest and s.is_read for s in before)
    newest = now.model_copy(update={"is_read": now.is_read or was_read})
    return [newest, *(sighting for sighting in before if sighting.state != now.state)][:_SIGHTINGS_MAX]


def _changed(contents: Mapping[str, str], folder: _Folder | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    names = contents.keys() | folder.contents.keys()
    return tuple(sorted(name for name in names if contents.get(name) != folder.contents.get(name)))
