"""Which files a model's parameters are made from, and what identifies their content on every machine.

Reads files; remembers nothing. ``source_records.py`` remembers what was read, so that a later look costs a few calls of
``stat``. Called by the loader, by conversions and by the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from sllm_vllm.checkpoint.checksum import RunningDigest, digest
from sllm_vllm.checkpoint.core.manifest import PARTITION_DIR, SourceFileRecord
from sllm_vllm.config import SOURCE_FILES_MAX
from sllm_vllm.errors import ConfigError, SourceMissing
from sllm_vllm.units import MIB

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".tensors", ".gguf")
INDEX_SUFFIX = ".index.json"
READ_ASIDE = ("mask_embedding.pt",)
"""Weight files of a model's directory that vLLM reads outside its loader (0.32: ``qwen3_dflash.py``)."""
_DEPTH_MAX = 8
_LINKS_MAX = 40
_SEGMENT_NBYTES = 256 * MIB
"""Files are hashed in segments of this size, in parallel, and the segments' digests once more."""
_BUFFER_NBYTES = 4 * MIB
_SAMPLE_NBYTES = 4096
_NUM_SAMPLES = 4
_THREADS_MAX = 8

_XXH3, _SHA256, _GIT_SHA1 = "xxh3", "sha256", "git-sha1"
_HASH_NAME = re.compile(r"(?!0+$)([0-9a-f]{40}|[0-9a-f]{64})")
_COMMIT = re.compile(r"(?!0+$)[0-9a-f]{40}")
_SHAPING_NAMES = ("modules.json", "adapter_config.json", "joint_head_config.json")
_OTHER_CODE = re.compile(r"(tokeniz|process|image_process|video_process|feature_extract)", re.IGNORECASE)


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class FileState(NamedTuple):
    """What the file system says about a file without reading it; any write changes it where ctime is kept."""

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """From a ``stat``."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def proves_same_as(self, other: FileState) -> bool:
        """Whether a file in this state holds what it held in ``other``.

        Device numbers of overlays and network mounts change with each container and each mount. They may differ if the
        ctime is the kernel's own: one with a fraction of a second, and no copy of the mtime.
        """
        has_ctime = self.ctime_ns != self.mtime_ns and self.ctime_ns % 1_000_000_000 != 0
        return self == other or (has_ctime and self[:-1] == other[:-1])


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that decides what parameters hold. ``name`` is its path in the model's directory, ``real`` without links.

    ``blob`` is the content's hash, ``sha256:…`` or ``git-sha1:…``, where the file's place in a Hub cache says it.
    ``is_weights``: it may be large; other files (indices, code, module configurations) are read at each look.
    ``link``: the state of the link itself, if ``path`` is one.
    """

    name: str
    path: Path
    real: str
    state: FileState
    blob: str | None
    is_weights: bool
    link: FileState | None = None

    @property
    def algorithm(self) -> str:
        """How its content is identified."""
        return _XXH3 if self.blob is None else self.blob.partition(":")[0]

    @property
    def is_as_downloaded(self) -> bool:
        """Whether a file in a Hub cache is untouched since its link was made, which comes after the download."""
        return self.link is not None and max(self.state.mtime_ns, self.state.ctime_ns) <= self.link.ctime_ns


def scan_source(directory: str | os.PathLike[str]) -> tuple[SourceFile, ...]:
    """The files of a model's directory and its sub-folders that decide what its parameters hold, by name.

    Raises:
        SourceMissing: there is no such directory, or no weight file in it. ConfigError: it can't be read, or holds too
            many files.
    """
    root = Path(directory)
    try:
        files = sorted(_walk(root, root, blobs=_blobs_of(root), above=()), key=lambda file: file.name)
    except OSError as error:
        unreadable = _unreadable(root, error)
        raise (unreadable if os.path.lexists(root) else SourceMissing(str(unreadable))) from None
    if not any(file.is_weights for file in files):
        suffixes = ", ".join(WEIGHT_SUFFIXES)
        raise SourceMissing(f"{root}: there are no weight files ({suffixes}); give a model's directory")
    return tuple(files)


def _walk(
    root: Path, directory: Path, *, blobs: Path | None, above: tuple[tuple[int, int], ...]
) -> Iterator[SourceFile]:
    status = directory.stat()
    place = (status.st_dev, status.st_ino)
    if place in above or len(above) >= _DEPTH_MAX:
        return  # a link that leads back up
    count = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            count += 1
            if count > SOURCE_FILES_MAX:
                raise ConfigError(
                    f"{directory}: it holds more than {SOURCE_FILES_MAX} entries; give a model's directory"
                )
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name != PARTITION_DIR:
                    yield from _walk(root, Path(entry.path), blobs=blobs, above=(*above, place))
            elif _counts(entry.name, is_root=not above) and (file := _source_file(root, entry, blobs=blobs)):
                yield file


def _counts(name: str, *, is_root: bool) -> bool:
    """Whether a file decides what parameters hold; the root's ``config.json`` is in the key of a checkpoint already."""
    if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)) or name in _SHAPING_NAMES:
        return True
    if name.endswith(".py"):
        return _OTHER_CODE.match(name) is None
    return name.endswith(".json") and ("quant" in name or (name == "config.json" and not is_root))


def _source_file(root: Path, entry: os.DirEntry[str], *, blobs: Path | None) -> SourceFile | None:
    """None for what is no file: a link without its target, as an interrupted download or a cleaned cache leaves it."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    path, real = Path(entry.path), os.path.realpath(entry.path)
    return SourceFile(
        name=path.relative_to(root).as_posix(),
        path=path,
        real=real,
        state=FileState.of(status),
        blob=_blob_name(path, real, blobs),
        is_weights=path.name.endswith(WEIGHT_SUFFIXES),
        link=FileState.of(entry.stat(follow_symlinks=False)) if entry.is_symlink() else None,
    )


def links_on(directory: Path) -> tuple[FileState, ...]:
    """The states of all links on the way to ``directory``: another one where a link was set anew, even to and fro.

    Raises:
        ConfigError: one of them can't be read.
    """
    found, place = list[FileState](), directory.absolute()
    try:
        while len(found) < _LINKS_MAX:
            link = next((path for path in (*reversed(place.parents), place) if path.is_symlink()), None)
            if link is None:
                break
            found.append(FileState.of(link.lstat()))
            place = link.parent / link.readlink() / place.relative_to(link)
    except OSError as error:
        raise _unreadable(directory, error) from None
    return tuple(found)


def hub_snapshot_of(directory: Path) -> tuple[str, str] | None:
    """A model's name and commit, if ``directory`` is where a Hub cache has a snapshot and is named like a commit."""
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    if not _COMMIT.fullmatch(directory.name):
        return None
    return repository.removeprefix("models--").replace("--", "/"), directory.name


def _blobs_of(root: Path) -> Path | None:
    """The folder of the files of the snapshot ``root``, if it is one of a Hub cache."""
    root = root.absolute()
    return (root.parent.parent / "blobs").resolve() if hub_snapshot_of(root) is not None else None


def _blob_name(path: Path, real: str, blobs: Path | None) -> str | None:
    """The hash that a file's place in a Hub cache says: the name of a file in this very repository's ``blobs``."""
    if blobs is None or not path.is_symlink():
        return None
    folder, name = os.path.split(real)
    if folder != str(blobs) or not _HASH_NAME.fullmatch(name):
        return None
    return f"{_SHA256 if len(name) == 64 else _GIT_SHA1}:{name}"


def fingerprint_of(records: Sequence[SourceFileRecord]) -> str:
    """One name for the content of all files: equal on every machine, whatever the files' times and places are."""
    return digest(json.dumps([[record.name, record.nbytes, record.digest] for record in records]).encode())


def fingerprint_directory(directory: str | os.PathLike[str]) -> str:
    """The fingerprint of a model's directory, all of whose bytes are read for it.

    Raises:
        ConfigError: the directory can't be read or holds no weight file.
    """
    files = scan_source(directory)
    return fingerprint_of([record_of(file, found) for file, found in zip(files, read_digests(files), strict=True)])


def record_of(file: SourceFile, content: str) -> SourceFileRecord:
    """What a manifest keeps of a file whose content is identified by ``content``."""
    return SourceFileRecord(name=file.name, nbytes=file.state.nbytes, digest=content)


def read_digests(files: Sequence[SourceFile]) -> list[str]:
    """Identify the content of ``files`` by reading every byte, several at once.

    Raises:
        ConfigError: a file can't be read, or is written to meanwhile.
    """
    with ThreadPoolExecutor(min(_THREADS_MAX, os.cpu_count() or 1), "sllm-hash") as pool:
        finishers = [_start_digest(file, pool.submit) for file in files]
        try:
            return [finish() for finish in finishers]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_digest(file: SourceFile, submit: Callable[..., Future[str]]) -> Callable[[], str]:
    """Start to read a file in the pool; the result waits and says what identifies its content."""
    nbytes = file.state.nbytes
    step = _SEGMENT_NBYTES if file.algorithm == _XXH3 else max(nbytes, 1)
    parts = [submit(_read_segment, file, start, min(step, nbytes - start)) for start in range(0, max(nbytes, 1), step)]

    def finish() -> str:
        digests = [part.result() for part in parts]
        try:
            changed = FileState.of(file.path.stat()) != file.state
        except OSError as error:
            raise _unreadable(file.path, error) from None
        if changed:
            raise ConfigError(f"{file.path}: it is written to while it is read; wait until it is complete")
        return f"{file.algorithm}:{digests[0] if len(digests) == 1 else digest(''.join(digests).encode())}"

    return finish


def _read_segment(file: SourceFile, start: int, nbytes: int) -> str:
    hasher = _hasher(file.algorithm, file.state.nbytes)
    buffer = memoryview(bytearray(min(_BUFFER_NBYTES, max(nbytes, 1))))
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset, end = start, start + nbytes
            while offset < end and (count := os.preadv(fd, [buffer[: end - offset]], offset)):
                hasher.update(buffer[:count])
                offset += count
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(file.path, error) from None
    return str(hasher.hexdigest())


def _hasher(algorithm: str, nbytes: int) -> _Hasher:
    if algorithm == _SHA256:
        return hashlib.sha256()
    if algorithm == _GIT_SHA1:
        return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    return RunningDigest()


def read_samples(file: SourceFile) -> str:
    """A digest of a few pages: notices a replaced file where the file system keeps neither ctime nor inodes.

    Raises:
        ConfigError: the file can't be read.
    """
    nbytes = file.state.nbytes
    offsets = sorted(
        {nbytes * part // _NUM_SAMPLES for part in range(_NUM_SAMPLES)} | {max(nbytes - _SAMPLE_NBYTES, 0)}
    )
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return digest(b"".join(os.pread(fd, _SAMPLE_NBYTES, offset) for offset in offsets))
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(file.path, error) from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: its weights can't be read ({error.strerror}); fix the path or permissions")


def is_from_hub(records: Sequence[SourceFileRecord]) -> bool:
    """Whether all weight files had their place in a Hub cache, and the content that their names say."""
    weights = [record for record in records if record.name.endswith(WEIGHT_SUFFIXES)]
    return bool(weights) and not any(record.digest.startswith(f"{_XXH3}:") for record in weights)


def changed_since(files: Sequence[SourceFile], records: Sequence[SourceFileRecord]) -> list[str]:
    """Names of weight files that vLLM reads outside its loader and that ``records`` know with another content.

    Raises:
        ConfigError: a file can't be read, or is written to meanwhile.
    """
    known = {record.name: record for record in records}
    compared = [file for file in files if file.is_weights and file.name in known]
    alike = [_read_like(file, known[file.name].digest) for file in compared]
    found = zip(compared, read_digests(alike), strict=True)
    return [file.name for file, content in found if content != known[file.name].digest]


def _read_like(file: SourceFile, content: str) -> SourceFile:
    """``file``, to be identified by the algorithm of ``content``."""
    return dataclasses.replace(file, blob=None if content.startswith(f"{_XXH3}:") else content)


def has_weight_files(directory: str | os.PathLike[str]) -> bool:
    """Whether a model directory holds weights that the stock loader could read."""
    try:
        names = os.listdir(directory)
        return any(name.endswith(WEIGHT_SUFFIXES) and name not in READ_ASIDE for name in names)
    except OSError:
        return False
