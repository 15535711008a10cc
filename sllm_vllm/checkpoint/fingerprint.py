"""Finds the files a model's parameters are made from, and identifies their content independently of the machine.

Reads files but keeps no record of them; ``source_records.py`` does, so that a later check costs only a few ``stat``
calls. Called by the loader, by conversions and by the command line.
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
"""Weight files in a model's directory that vLLM reads outside its loader (0.32: ``qwen3_dflash.py``)."""
_DEPTH_MAX = 8
_LINKS_MAX = 40
_SEGMENT_NBYTES = 256 * MIB
"""With xxh3, files are hashed in segments of this size, in parallel, and then the segments' digests are hashed."""
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
    """A file's metadata from ``stat``. Any write changes it, on file systems that keep ctime."""

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Make one from a ``stat`` result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def proves_same_as(self, other: FileState) -> bool:
        """Whether a file in this state has the same content as it had in state ``other``.

        Device numbers of overlays and network mounts change with each container and each mount. They may therefore
        differ if the ctime was clearly set by the kernel: it has a fraction of a second and differs from the mtime.
        """
        has_ctime = self.ctime_ns != self.mtime_ns and self.ctime_ns % 1_000_000_000 != 0
        return self == other or (has_ctime and self[:-1] == other[:-1])


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that affects the contents of parameters.

    ``name``: its path inside the model's directory; ``real``: its path with all links resolved.
    ``blob``: the content's hash, ``sha256:…`` or ``git-sha1:…``, if the file's name in a Hub cache gives it.
    ``is_weights``: whether it is a weight file, which may be large; all other files (indices, code, module
    configurations) are read at every check.
    ``link``: the state of the symbolic link itself, if ``path`` is one.
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
        """The hash algorithm that identifies its content."""
        return _XXH3 if self.blob is None else self.blob.partition(":")[0]

    @property
    def is_as_downloaded(self) -> bool:
        """Whether a file in a Hub cache is unchanged since its link was made, which happens after the download."""
        return self.link is not None and max(self.state.mtime_ns, self.state.ctime_ns) <= self.link.ctime_ns


def scan_source(directory: str | os.PathLike[str]) -> tuple[SourceFile, ...]:
    """Return the files below a model's directory that affect the contents of its parameters, sorted by name.

    Raises:
        SourceMissing: the directory does not exist or holds no weight file.
        ConfigError: the directory can't be read, or holds too many files.
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
        return  # a link back to a parent directory, or nested too deeply
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
    """Whether a file affects parameters' contents. The root's ``config.json`` is already in a checkpoint's key."""
    if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)) or name in _SHAPING_NAMES:
        return True
    if name.endswith(".py"):
        return _OTHER_CODE.match(name) is None
    return name.endswith(".json") and ("quant" in name or (name == "config.json" and not is_root))


def _source_file(root: Path, entry: os.DirEntry[str], *, blobs: Path | None) -> SourceFile | None:
    """Describe an entry. Returns None if it is not a regular file, or a dangling link.

    Interrupted downloads and cleaned caches leave dangling links.
    """
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
    """Return the states of all symbolic links on the path to ``directory``.

    A link that was replaced has a new state, even if it points to its old target again.

    Raises:
        ConfigError: a link can't be read.
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
    """Return a model's name and commit if ``directory`` is a snapshot in a Hub cache that is named like a commit."""
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    if not _COMMIT.fullmatch(directory.name):
        return None
    return repository.removeprefix("models--").replace("--", "/"), directory.name


def _blobs_of(root: Path) -> Path | None:
    """Return the ``blobs`` folder that the snapshot ``root`` links to, if ``root`` is a snapshot in a Hub cache."""
    root = root.absolute()
    return (root.parent.parent / "blobs").resolve() if hub_snapshot_of(root) is not None else None


def _blob_name(path: Path, real: str, blobs: Path | None) -> str | None:
    """Return the hash that a file's name in a Hub cache gives, if it links into the ``blobs`` of its own repository."""
    if blobs is None or not path.is_symlink():
        return None
    folder, name = os.path.split(real)
    if folder != str(blobs) or not _HASH_NAME.fullmatch(name):
        return None
    return f"{_SHA256 if len(name) == 64 else _GIT_SHA1}:{name}"


def fingerprint_of(records: Sequence[SourceFileRecord]) -> str:
    """Return a digest of the content of all files. It does not depend on the machine, nor on file times or paths."""
    return digest(json.dumps([[record.name, record.nbytes, record.digest] for record in records]).encode())


def fingerprint_directory(directory: str | os.PathLike[str]) -> str:
    """Return the fingerprint of a model's directory, reading every byte of its files.

    Raises:
        ConfigError: the directory can't be read or holds no weight file.
    """
    files = scan_source(directory)
    return fingerprint_of([record_of(file, found) for file, found in zip(files, read_digests(files), strict=True)])


def record_of(file: SourceFile, content: str) -> SourceFileRecord:
    """Return the manifest's record of a file whose content has the digest ``content``."""
    return SourceFileRecord(name=file.name, nbytes=file.state.nbytes, digest=content)


def read_digests(files: Sequence[SourceFile]) -> list[str]:
    """Return the digests of ``files``. Reads every byte, several files at once.

    Raises:
        ConfigError: a file can't be read, or changed while it was read.
    """
    with ThreadPoolExecutor(min(_THREADS_MAX, os.cpu_count() or 1), "sllm-hash") as pool:
        finishers = [_start_digest(file, pool.submit) for file in files]
        try:
            return [finish() for finish in finishers]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_digest(file: SourceFile, submit: Callable[..., Future[str]]) -> Callable[[], str]:
    """Start reading a file in the pool. Returns a function that waits for the result and returns the file's digest."""
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
    """Return a digest of a few pages of a file.

    It detects a replaced file on file systems that keep neither ctime nor inode numbers.

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
    """Whether all weight files came from a Hub cache and had the content that their names there give."""
    weights = [record for record in records if record.name.endswith(WEIGHT_SUFFIXES)]
    return bool(weights) and not any(record.digest.startswith(f"{_XXH3}:") for record in weights)


def changed_since(files: Sequence[SourceFile], records: Sequence[SourceFileRecord]) -> list[str]:
    """Return the names of weight files whose content differs from ``records``; files not in ``records`` are skipped.

    Raises:
        ConfigError: a file can't be read, or changed while it was read.
    """
    known = {record.name: record for record in records}
    compared = [file for file in files if file.is_weights and file.name in known]
    alike = [_read_like(file, known[file.name].digest) for file in compared]
    found = zip(compared, read_digests(alike), strict=True)
    return [file.name for file, content in found if content != known[file.name].digest]


def _read_like(file: SourceFile, content: str) -> SourceFile:
    """Return ``file`` so that its content is hashed with the same algorithm as ``content``."""
    return dataclasses.replace(file, blob=None if content.startswith(f"{_XXH3}:") else content)


def has_weight_files(directory: str | os.PathLike[str]) -> bool:
    """Whether a model's directory holds weights that the stock loader can read."""
    try:
        names = os.listdir(directory)
        return any(name.endswith(WEIGHT_SUFFIXES) and name not in READ_ASIDE for name in names)
    except OSError:
        return False
