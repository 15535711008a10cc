"""Remote sources of checkpoints behind one interface: a folder, an HTTP server, S3, the Hugging Face Hub.

A remote is a URL below which ``<name>/manifest.json`` and ``<name>/partitions/…`` lie, as on disk. Nothing here retries
a read: ``fetch.py`` does. No message ever holds a URL's user or query, nor what obstore says, which quotes them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, LocalStore, S3Store

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.repository import is_legal_name
from sllm_vllm.checkpoint.writer import sync_directory, write_errors
from sllm_vllm.config import MANIFEST_NBYTES_MAX
from sllm_vllm.errors import (
    ConfigError,
    DiskFull,
    RemoteCorrupt,
    RemoteMissing,
    RemoteRefused,
    RemoteUnreachable,
    SllmError,
)
from sllm_vllm.units import KIB, MIB

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

PIECE_NBYTES = 4 * MIB
PIECE_NBYTES_MIN = 256 * KIB
"""How much of an answer is taken at a time: each costs a turn of the loop, and what is begun of one is lost with it."""
STALL_S = 20.0
"""Longest wait for a piece of a manifest, unless the caller says another."""
PUT_PART_NBYTES = 8 * MIB
PUT_PARTS_MAX = 9000
PUT_CONCURRENCY = 4
PUT_RETRIES_MAX = 5
PUT_TIMEOUT = timedelta(minutes=10)
"""Longest that one part takes."""
READ_TIMEOUT = timedelta(days=7)
"""It is for a whole answer, however large and slow: ``fetch.py`` notices a stall instead."""

_STATUS = re.compile(r"status code: (\d{3})")
_OTHER_RANGE = re.compile(r"UnexpectedRange|InvalidRange|StartTooLarge|NoContentRange|ParseContentRange|got \d+\.\.\d+")
_RETRIED_STATUS = {408, 425, 429}
_MEND_TRY = "try again later, or see whether the server is well"
_MEND_CORRUPT = "push the checkpoint again"
_SCHEMES = "file:///dir, http(s)://host/path, s3://bucket/prefix, hf://org/name[@revision][/subfolder]"


@dataclass(frozen=True, slots=True)
class Remote:
    """One remote source. Holds connections, which obstore pools; any number of tasks may use it at once."""

    shown: str
    """Its URL without user and query."""
    is_writable: bool
    _store: Callable[[bool], ObjectStore] = field(repr=False)
    """For reading, or for writing: that one has obstore's own retries, as nothing else retries what is written."""
    _folder: Path | None = None
    _only_name: str | None = None
    """Set where the URL itself is the one checkpoint."""

    def shown_file(self, name: str, path: str) -> str:
        """URL of a file of a checkpoint, for messages."""
        return f"{self.shown}/{self._key(name, path)}"

    async def read_manifest(self, name: str, *, stall_s: float = STALL_S) -> bytes:
        """The manifest's bytes, as they lie there: not yet validated.

        Raises:
            RemoteMissing: it has no such checkpoint. RemoteCorrupt: too large. RemoteUnreachable: it does not answer.
        """
        parts: list[bytes] = []
        with self._errors(name, MANIFEST_NAME):
            async with asyncio.timeout(stall_s) as deadline:
                result = await obstore.get_async(self._store(False), self._key(name, MANIFEST_NAME))
                async for part in result.stream(min_chunk_size=PIECE_NBYTES):
                    parts.append(part)
                    if sum(map(len, parts)) > MANIFEST_NBYTES_MAX:
                        problem = f"it is too large for a manifest (more than {MANIFEST_NBYTES_MAX} bytes)"
                        raise RemoteCorrupt(self.shown_file(name, MANIFEST_NAME), problem, _MEND_CORRUPT)
                    deadline.reschedule(asyncio.get_running_loop().time() + stall_s)
        return b"".join(parts)

    async def open_range(
        self, name: str, path: str, *, start: int, nbytes: int, file_nbytes: int
    ) -> AsyncGenerator[bytes, None]:
        """Ask for ``nbytes`` bytes from ``start``; the answer is a stream of pieces, each a buffer of its own.

        The stream may end early or go on too long: the caller counts.

        Args:
            file_nbytes: what the whole file must have.

        Raises:
            RemoteMissing: no such file. RemoteRefused: it wants other credentials, or knows no ranges.
            RemoteCorrupt: it has another range or size. RemoteUnreachable: anything else; worth another attempt.
        """
        with self._errors(name, path):
            options: obstore.GetOptions = {"range": (start, start + nbytes)}
            result = await obstore.get_async(self._store(False), self._key(name, path), options=options)
        if result.range != (start, start + nbytes) or result.meta["size"] != file_nbytes:
            problem = f"the file has {result.meta['size']} bytes, the manifest says {file_nbytes}"
            raise RemoteCorrupt(self.shown_file(name, path), problem, _MEND_CORRUPT)
        return self._stream(result, name, path, nbytes=nbytes)

    async def _stream(self, result: GetResult, name: str, path: str, *, nbytes: int) -> AsyncGenerator[bytes, None]:
        with self._errors(name, path):
            piece_nbytes = min(PIECE_NBYTES, max(PIECE_NBYTES_MIN, nbytes // 4))
            async for piece in result.stream(min_chunk_size=piece_nbytes):
                yield piece

    async def put(self, name: str, path: str, content: bytes | AsyncIterator[memoryview], *, nbytes: int) -> None:
        """Write a file, whole or not at all. A stream is sent in parts; few of them are in memory at once.

        Raises:
            ConfigError: this kind of remote can't be written. RemoteError: it refuses or breaks off.
            DiskFull: it is a folder on a full disk.
        """
        self.require_writable()
        with self._errors(name, path):
            await obstore.put_async(
                self._store(True),
                self._key(name, path),
                content,
                use_multipart=not isinstance(content, bytes),
                chunk_size=max(PUT_PART_NBYTES, -(-nbytes // PUT_PARTS_MAX)),
                max_concurrency=PUT_CONCURRENCY,
            )
        if self._folder is not None:
            await asyncio.to_thread(_sync_file, self._folder / self._key(name, path))

    async def remove(self, name: str, path: str) -> None:
        """Remove a file; it is well if there is none."""
        self.require_writable()
        with self._errors(name, path), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store(True), self._key(name, path))

    def require_writable(self) -> None:
        """Raise ``ConfigError`` unless this kind of remote can be written."""
        if not self.is_writable:
            raise ConfigError(f"{self.shown}: it can only be read; push to file:// or s3://")

    def _key(self, name: str, path: str) -> str:
        if not is_legal_name(name) or self._only_name not in {None, name}:
            raise RemoteMissing(
                f"{self.shown}/{name[:255]!r}", "it can have no checkpoint of this name", "check the name"
            )
        return path if self._only_name is not None else f"{name}/{path}"

    @contextlib.contextmanager
    def _errors(self, name: str, path: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise RemoteUnreachable(
                self.shown_file(name, path), "it stalls: nothing came for long", _MEND_TRY
            ) from None
        except (BaseError, FileNotFoundError, NotImplementedError, PermissionError) as error:
            raise _translated(error, self.shown_file(name, path)) from None


def open_remote(url: str, *, endpoint: str | None = None) -> Remote:
    """The remote at ``url``; nothing is asked of it yet.

    S3 takes endpoint and keys from AWS's own variables, the Hub its endpoint and token as huggingface_hub does.

    Args:
        endpoint: of S3 or the Hub, instead of the environment's.

    Raises:
        ConfigError: no URL of a remote; the message does not repeat its secrets.
    """
    parts = _split(url)
    if parts.scheme == "file":
        return _open_folder(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return _open_s3(parts, endpoint)
    if parts.scheme == "hf":
        return _open_hub(parts, endpoint)
    return _open_http(parts)


def open_checkpoint_url(url: str, *, endpoint: str | None = None) -> tuple[Remote, str]:
    """The remote that holds the one checkpoint at ``url``, and the checkpoint's name: the last component.

    Raises:
        ConfigError: no such URL, or its last component is no name for a checkpoint.
    """
    parts = _split(url)
    path = parts.path.rstrip("/")
    if parts.scheme == "hf" and path.count("/") == 1:  # the repository itself is the checkpoint
        name = path.rpartition("/")[2].partition("@")[0]
        remote = _open_hub(parts, endpoint, name)
    else:
        parent, _, name = path.rpartition("/")
        name = unquote(name)
        remote = open_remote(parts._replace(path=parent or "/").geturl(), endpoint=endpoint)
    if not is_legal_name(name):
        raise ConfigError(f"{_shown(parts)}: {name[:255]!r} is no name for a checkpoint; end the URL with one")
    return remote, name


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(f"file://{quote(url)}" if url.startswith("/") else url)
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"a remote's URL can't be read; give one of {_SCHEMES}") from None
    has_host = bool(parts.hostname) if parts.scheme in {"http", "https", "s3", "hf"} else not parts.netloc
    if parts.scheme not in {"file", "http", "https", "s3", "hf"} or not has_host or not port_is_sound:
        raise ConfigError(f"{_shown(parts)}: no URL of a remote; give one of {_SCHEMES}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{_shown(parts)}: a remote's URL may have no query; give credentials in another way")
    if ".." in unquote(parts.path).split("/"):
        raise ConfigError(f"{_shown(parts)}: a remote's URL may not hold `..`")
    return parts


def _shown(parts: SplitResult) -> str:
    """The URL without user, query and fragment."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _open_folder(folder: Path) -> Remote:
    def store(is_written: bool) -> ObjectStore:
        if not is_written and not folder.is_dir():
            raise FileNotFoundError
        return LocalStore(folder, mkdir=is_written)

    return Remote(f"file://{folder}", True, store, folder)


def _open_http(parts: SplitResult) -> Remote:
    """User and password in the URL become a header: obstore would leave them away."""
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return _http_remote(_shown(parts), _shown(parts), headers)


def _open_hub(parts: SplitResult, endpoint: str | None, only_name: str | None = None) -> Remote:
    """Files of the Hub lie at ``<endpoint>/<org>/<name>/resolve/<revision>/<path>``, from where it redirects."""
    from huggingface_hub import constants, get_token

    repository, *subfolder = parts.path.strip("/").split("/")
    repository, _, revision = repository.partition("@")
    if not repository:
        raise ConfigError(f"{_shown(parts)}: no URL of a repository; give hf://org/name[@revision][/subfolder]")
    base = (endpoint or constants.ENDPOINT).rstrip("/")
    where = [parts.netloc, repository, "resolve", quote(unquote(revision or "main"), safe=""), *subfolder]
    token = get_token()
    # reqwest takes the header off when it follows a redirect to another host or port
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return _http_remote("/".join([base, *where]), _shown(parts), headers, only_name=only_name)


def _http_remote(url: str, shown: str, headers: dict[str, str], *, only_name: str | None = None) -> Remote:
    client = _client(allow_http=url.startswith("http:"), headers=headers)
    reader = HTTPStore(url, client_options=client, retry_config={"max_retries": 0})
    return Remote(shown, False, lambda is_written: reader, None, only_name)


def _open_s3(parts: SplitResult, endpoint: str | None) -> Remote:
    # Whether the endpoint is http is its owner's choice; a request holds a signature, never the secret key.
    config: S3Config = {} if endpoint is None else {"endpoint": endpoint}
    prefix = unquote(parts.path.strip("/")) or None
    bucket = parts.netloc

    def store(retries_max: int, timeout: timedelta) -> ObjectStore:
        retries: RetryConfig = {"max_retries": retries_max}
        client = _client(allow_http=True, timeout=timeout)
        return S3Store(bucket, prefix=prefix, config=config, client_options=client, retry_config=retries)

    reader, writer = store(0, READ_TIMEOUT), store(PUT_RETRIES_MAX, PUT_TIMEOUT)
    return Remote(_shown(parts), True, lambda is_written: writer if is_written else reader)


def _client(
    *, allow_http: bool, headers: dict[str, str] | None = None, timeout: timedelta = READ_TIMEOUT
) -> ClientConfig:
    options: ClientConfig = {"allow_http": allow_http, "timeout": timeout}
    if headers:
        options["default_headers"] = headers
    return options


def _sync_file(path: Path) -> None:
    with write_errors(path):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(path.parent)


def _translated(error: Exception, shown: str) -> SllmError:
    """Our error for obstore's, whose text may hold secrets: only the status is taken from it."""
    text = str(error)
    found = _STATUS.search(text)
    status = int(found[1]) if found else None
    if isinstance(error, FileNotFoundError):
        return RemoteMissing(shown, "there is no such file", "see whether the checkpoint was pushed there")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "Permission denied" in text:
        refused = f"access is refused{f' (HTTP {status})' if status else ''}"
        return RemoteRefused(shown, refused, "check the credentials (token, keys or permissions)")
    if isinstance(error, NotSupportedError):
        return RemoteRefused(shown, "the server ignores ranges", "serve the checkpoint with one that knows them")
    if "No space left" in text:
        return DiskFull(shown, "no space is left on the device", "free some")
    if status == 416 or _OTHER_RANGE.search(text):
        return RemoteCorrupt(shown, "it answers with another range than was asked for", _MEND_CORRUPT)
    if status is not None and status < 500 and status not in _RETRIED_STATUS:
        return RemoteRefused(shown, f"it answers HTTP {status}", "check the URL")
    if status is not None:
        return RemoteUnreachable(shown, f"it answers HTTP {status}", _MEND_TRY)
    if "kind: Connect" in text:
        return RemoteUnreachable(shown, "no connection can be made", "check the URL, and whether the server runs")
    return RemoteUnreachable(shown, "the connection broke off", _MEND_TRY)
