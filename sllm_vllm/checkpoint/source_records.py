"""What was seen of source weights on this machine: content is read once, later looks compare what ``stat`` says.

::

    <root>/.sources/<digest of a path>.json    one record a model's directory, or a repository in a Hub cache

A record says for each file: in this state (size, times, inode, device) it had this content. It is believed only if the
file had not been written to in the two seconds before it was read: a later write in the same tick of the file system's
clock could leave the state as it is. A file that a Hub cache names by its hash is not read at its first sight unless it
is younger than its link, but whenever its state has changed since: it could have been written to in place.
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
from sllm_vllm.plain_file import read_plain

Effort = Literal["unknown", "named", "all"]

_SOURCES = ".sources"
_SETTLED_NS = 2_000_000_000
"""FAT's tick, the coarsest of the file systems in use."""
_AHEAD_NS = 86_400 * 1_000_000_000
"""Stamps further ahead than any zone or skew were set, or are of a clock that was wrong: no write of this moment."""
_PATHS_MAX = 20_000
_SIGHTINGS_MAX = 32
"""Nodes that share a store see one path with different inodes and devices."""


class _Sighting(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    state: Annotated[list[int], Field(min_length=5, max_length=5)]
    samples: str | None
    digest: str | None
    """None: the file had been written to a moment ago, so that its state proves nothing."""
    is_read: bool
    """False: the digest is what the file's name in a Hub cache says."""


class _Folder(BaseModel):
    """What a model's directory held when all of its files were identified last."""

    model_config = ConfigDict(frozen=True, strict=True)

    fingerprint: str
    contents: dict[str, str]


class _Record(BaseModel):
    """``sightings`` are by a file's real path: two snapshots in a Hub cache share files."""

    model_config = ConfigDict(frozen=True, strict=True)

    is_whole: bool = True
    """False: an earlier record was lost, so that a file without a sighting may have been seen."""
    sightings: dict[str, list[_Sighting]] = {}
    folders: dict[str, _Folder] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """The content of a model's source files. ``changed``: files that are other ones than when they were seen last."""

    files: tuple[SourceFileRecord, ...]
    changed: tuple[str, ...] = ()
    nbytes_read: int = 0
    seconds: float = 0.0

    @property
    def fingerprint(self) -> str:
        """One name for all of it, equal on every machine."""
        return fingerprint_of(self.files)


@dataclass(slots=True)
class _Look:
    """One look at a directory: which files are known, and which have to be read."""

    known: dict[str, str] = field(default_factory=dict)
    believed: set[str] = field(default_factory=set)
    """Those of them that an earlier sighting tells."""
    unknown: list[SourceFile] = field(default_factory=list)


class SourceRecords:
    """The records below one root. Holds no state; where they can't be written, sources are read at each look."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def known(self, directory: Path, files: Sequence[SourceFile]) -> Identified | None:
        """The content of ``files`` if they need not be read for it; takes a few calls of ``stat`` for each.

        Raises:
            ConfigError: a file can't be read.
        """
        record = self._read(directory)
        look = _look(files, record)
        if any(file.is_weights for file in look.unknown):
            return None
        return self._identified(directory, files, look=look, record=record)

    def identify(self, directory: Path, files: Sequence[SourceFile], *, effort: Effort = "unknown") -> Identified:
        """The content of ``files``, after reading some of them.

        Processes that ask for one directory at once wait for the first of them.

        Args:
            effort: which files are read: those whose content is not known, also those that are known by a name in a
                Hub cache alone, or all.

        Raises:
            ConfigError: a file can't be read, or is written to meanwhile.
        """
        with self._one_reader(directory):
            record = self._read(directory)
            look = _Look(unknown=list(files)) if effort == "all" else _look(files, record, effort=effort)
            return self._identified(directory, files, look=look, record=record)

    def folders(self) -> dict[Path, str]:
        """Model directories that were seen, and the fingerprint of what each held then."""
        found = {}
        with contextlib.suppress(OSError):
            for path in sorted((self._root / _SOURCES).glob("*.json")):
                found.update({Path(name): folder.fingerprint for name, folder in _parse(path).folders.items()})
        return found

    def _identified(
        self, directory: Path, files: Sequence[SourceFile], *, look: _Look, record: _Record | None
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
        old = record or _Record()
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

    def _read(self, directory: Path) -> _Record | None:
        """None: nothing at this place was ever looked at."""
        path = self._path(directory)
        return _parse(path) if os.path.lexists(path) else None

    def _write(self, directory: Path, old: _Record | None, new: _Record) -> None:
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
            with contextlib.suppress(OSError):  # a file system without locks: each process reads
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough when a forked child holds the descriptor, too
            os.close(fd)


def _parse(path: Path) -> _Record:
    """A record; an empty one that is not whole if it can't be read or used."""
    try:
        return _Record.model_validate_json(read_plain(path, SOURCE_RECORD_NBYTES_MAX))
    except (OSError, ValidationError):
        pass
    return _Record(is_whole=False)


def _updated(old: _Record, *, sightings: dict[str, list[_Sighting]], folders: dict[str, _Folder]) -> _Record:
    """``old`` with what was seen now; too many sightings, of files that have gone, are dropped."""
    merged, is_whole = old.sightings | sightings, old.is_whole
    if len(merged) > _PATHS_MAX:
        merged, is_whole = sightings, False
    kept = {name: folder for name, folder in old.folders.items() if os.path.isdir(name)}
    return _Record(is_whole=is_whole, sightings=merged, folders=kept | folders)


def _look(files: Sequence[SourceFile], record: _Record | None, *, effort: Effort = "unknown") -> _Look:
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


def _is_first_sight(file: SourceFile, seen: object, record: _Record | None) -> bool:
    """Whether the name of a file in a Hub cache is all that is known of it."""
    is_named = file.is_weights and file.blob is not None and file.is_as_downloaded
    return is_named and seen is None and (record is None or record.is_whole)


def _recall(file: SourceFile, seen: Sequence[_Sighting], *, trusts_names: bool) -> str | None:
    """The content that a file had in the state in which it is now."""
    for sighting in seen:
        is_same = file.state.proves_same_as(FileState(*sighting.state))
        if is_same and sighting.digest is not None and (trusts_names or sighting.is_read):
            return sighting.digest if sighting.samples == read_samples(file) else None
    return None


def _sighting(file: SourceFile, content: str, *, began_ns: int, is_read: bool) -> _Sighting:
    """``began_ns``: when reading began, or the state was taken."""
    ages_ns = (began_ns - file.state.mtime_ns, began_ns - file.state.ctime_ns)
    is_settled = not any(-_AHEAD_NS <= age_ns <= _SETTLED_NS for age_ns in ages_ns)
    return _Sighting(
        state=list(file.state),
        samples=read_samples(file) if is_settled else None,
        digest=content if is_settled else None,
        is_read=is_read,
    )


def _merged(now: _Sighting, before: Sequence[_Sighting]) -> list[_Sighting]:
    """The sightings of a file, the newest first. What was read once stays known as read."""
    was_read = any(s.state == now.state and s.digest == now.digest and s.is_read for s in before)
    newest = now.model_copy(update={"is_read": now.is_read or was_read})
    return [newest, *(sighting for sighting in before if sighting.state != now.state)][:_SIGHTINGS_MAX]


def _changed(contents: Mapping[str, str], folder: _Folder | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    names = contents.keys() | folder.contents.keys()
    return tuple(sorted(name for name in names if contents.get(name) != folder.contents.get(name)))
