"""Remote sources of checkpoints behind one interface: a folder, an HTTP server, S3, the Hugging Face Hub.

A remote is a URL below which ``<name>/manifest.json`` and ``<name>/partitions/…`` are stored, as on disk. This module
never retries a read; ``fetch.py`` does. No error message contains a URL's user or query, or obstore's error text, which
quotes them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, unquote, urlsplit

import aiohttp
import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.repository import is_legal_name
from sllm_vllm.checkpoint.writer import sync_directory, write_errors
from sllm_vllm.config import MANIFEST_NBYTES_MAX, read_variable
from sllm_vllm.errors import (
    ConfigError,
    DiskFull,
    RemoteCorrupt,
    RemoteMissing,
    RemoteRefused,
    RemoteUnreachable,
    SllmError,
)
from sllm_vllm.store.core.redirects import HUB_HOSTS
from sllm_vllm.store.http_source import (
    MEND_CORRUPT,
    MEND_TRY,
    HttpAnswer,
    HttpSource,
    error_of_status,
    translated_http,
)
from sllm_vllm.units import KIB, MIB

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

PIECE_NBYTES = 4 * MIB
PIECE_NBYTES_MIN = 256 * KIB
"""Size of the pieces of an answer: each costs a turn of the event loop, and a failure loses an unfinished one."""
STALL_S = 20.0
"""Default timeout for each piece of a manifest."""
PUT_PART_NBYTES = 8 * MIB
PUT_PARTS_MAX = 9000
PUT_CONCURRENCY = 4
PUT_RETRIES_MAX = 5
PUT_TIMEOUT = timedelta(minutes=10)
"""Timeout for one part of an upload."""
SIGNED_FOR = timedelta(hours=1)
"""How long a signed URL for a read from S3 is valid. Long enough for the request to arrive despite clock skew."""

_STATUS = re.compile(r"status code: (\d{3})")
_OTHER_RANGE = re.compile(r"UnexpectedRange|InvalidRange|StartTooLarge|NoContentRange|ParseContentRange|got \d+\.\.\d+")
_SCHEMES = "file:///dir, http(s)://host/path, s3://bucket/prefix, hf://org/name[@revision][/subfolder]"


@dataclass(frozen=True, slots=True)
class Remote:
    """One remote source, with its pooled connections. Any number of tasks may use it at once."""

    shown: str
    """Its URL without user and query, for messages."""
    _source: HttpSource | _ObjectSource = field(repr=False)
    _store: Callable[[], ObjectStore] | None = field(default=None, repr=False)
    """Makes the object store for writes, which obstore itself retries; None if the remote is read-only."""
    _folder: Path | None = None
    _only_name: str | None = None
    """Set if the URL itself is a single checkpoint: that checkpoint's name."""

    def shown_file(self, name: str, path: str) -> str:
        """Return the URL of a checkpoint's file, for messages."""
        return f"{self.shown}/{self._key(name, path)}"

    async def read_manifest(self, name: str, *, stall_s: float = STALL_S) -> bytes:
        """Return the bytes of a manifest, not yet validated.

        Raises:
            RemoteMissing: the remote has no such checkpoint. RemoteCorrupt: the manifest is too large.
            RemoteUnreachable: the remote does not answer.
        """
        parts: list[bytes] = []
        nbytes = 0
        with self._errors(name, MANIFEST_NAME):
            async with asyncio.timeout(stall_s) as deadline:
                answer = await self._source.get(self._key(name, MANIFEST_NAME), self.shown_file(name, MANIFEST_NAME))
                async with contextlib.aclosing(answer.pieces()) as stream:
                    async for part in stream:
                        parts.append(bytes(part))
                        if (nbytes := nbytes + len(part)) > MANIFEST_NBYTES_MAX:
                            problem = f"it is too large for a manifest (more than {MANIFEST_NBYTES_MAX} bytes)"
                            raise RemoteCorrupt(self.shown_file(name, MANIFEST_NAME), problem, MEND_CORRUPT)
                        deadline.reschedule(asyncio.get_running_loop().time() + stall_s)
        return b"".join(parts)

    async def open_range(
        self, name: str, path: str, *, start: int, nbytes: int, file_nbytes: int
    ) -> AsyncGenerator[bytes, None]:
        """Request ``nbytes`` bytes from ``start``. Returns a stream of pieces, each in its own buffer.

        The stream may be too short or too long; the caller must count the bytes.

        Args:
            file_nbytes: the expected size of the whole file.

        Raises:
            RemoteMissing: no such file. RemoteRefused: the credentials are refused, or ranges are not supported.
            RemoteCorrupt: the range or the file's size is wrong. RemoteUnreachable: any other failure; may be retried.
        """
        shown = self.shown_file(name, path)
        with self._errors(name, path):
            answer = await self._source.get(self._key(name, path), shown, (start, start + nbytes))
        stream = self._stream(answer, name, path)
        if (answer.start, answer.end, answer.size) != (start, start + nbytes, file_nbytes):
            await answer.pieces().aclose()
            problem = f"the file has {answer.size} bytes, the manifest says {file_nbytes}"
            raise RemoteCorrupt(shown, problem, MEND_CORRUPT)
        return stream

    async def _stream(self, answer: HttpAnswer | _ObjectAnswer, name: str, path: str) -> AsyncGenerator[bytes, None]:
        with self._errors(name, path):
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    yield piece

    async def put(self, name: str, path: str, content: bytes | AsyncIterator[memoryview], *, nbytes: int) -> None:
        """Write a file atomically. A stream is uploaded in parts, of which only a few are in memory at once.

        Raises:
            ConfigError: this kind of remote is read-only. RemoteError: the remote refuses, or the connection breaks.
            DiskFull: the remote is a folder on a full disk.
        """
        store = self.require_writable()
        with self._errors(name, path):
            await obstore.put_async(
                store(),
                self._key(name, path),
                content,
                use_multipart=not isinstance(content, bytes),
                chunk_size=max(PUT_PART_NBYTES, -(-nbytes // PUT_PARTS_MAX)),
                max_concurrency=PUT_CONCURRENCY,
            )
        if self._folder is not None:
            await asyncio.to_thread(_sync_file, self._folder / self._key(name, path))

    async def remove(self, name: str, path: str) -> None:
        """Remove a file, if it exists."""
        store = self.require_writable()
        with self._errors(name, path), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(store(), self._key(name, path))

    def require_writable(self) -> Callable[[], ObjectStore]:
        """Return the function that makes the object store for writes.

        Raises:
            ConfigError: this kind of remote is read-only.
        """
        if self._store is None:
            raise ConfigError(f"{self.shown}: it can only be read; push to file:// or s3://")
        return self._store

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
                self.shown_file(name, path), "it stalls: no data arrived for long", MEND_TRY
            ) from None
        except (BaseError, FileNotFoundError, NotImplementedError, PermissionError) as error:
            raise _translated(error, self.shown_file(name, path)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise translated_http(error, self.shown_file(name, path)) from None


@dataclass(frozen=True, slots=True)
class _ObjectSource:
    """Reads files with obstore; used for folders."""

    store: Callable[[], ObjectStore]

    async def get(self, key: str, shown: str, bounds: tuple[int, int] | None = None) -> _ObjectAnswer:
        """See ``HttpSource.get``, but raises obstore's errors."""
        del shown
        options: obstore.GetOptions = {} if bounds is None else {"range": bounds}
        result = await obstore.get_async(self.store(), key, options=options)
        nbytes = PIECE_NBYTES if bounds is None else bounds[1] - bounds[0]
        piece_nbytes = min(PIECE_NBYTES, max(PIECE_NBYTES_MIN, nbytes // 4))
        return _ObjectAnswer(*result.range, result.meta["size"], result, piece_nbytes)


@dataclass(frozen=True, slots=True)
class _ObjectAnswer:
    """See ``HttpAnswer``."""

    start: int
    end: int
    size: int
    result: GetResult
    piece_nbytes: int

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces of at least ``piece_nbytes``."""
        async for piece in self.result.stream(min_chunk_size=self.piece_nbytes):
            yield piece


def open_remote(url: str, *, endpoint: str | None = None, redirect_hosts: Sequence[str] = ()) -> Remote:
    """Return the remote at ``url``. Sends no request.

    S3's endpoint and keys come from the standard AWS variables; the Hub's endpoint and token from huggingface_hub.

    Args:
        endpoint: endpoint of S3 or the Hub; default: from the environment.
        redirect_hosts: hosts to which http(s), S3 and the Hub may redirect, in addition to their own hosts and the
            Hub's download networks.

    Raises:
        ConfigError: ``url`` is not the URL of a remote. The message contains no secrets from it.
    """
    parts = _split(url)
    if parts.scheme == "file":
        return _open_folder(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return _open_s3(parts, endpoint, redirect_hosts)
    if parts.scheme == "hf":
        return _open_hub(parts, endpoint, redirect_hosts)
    return _open_http(parts, redirect_hosts)


def open_checkpoint_url(
    url: str, *, endpoint: str | None = None, redirect_hosts: Sequence[str] = ()
) -> tuple[Remote, str]:
    """Return the remote that holds the checkpoint at ``url``, and the checkpoint's name: the last URL component.

    Raises:
        ConfigError: ``url`` is not the URL of a remote, or its last component is not a valid checkpoint name.
    """
    parts = _split(url)
    path = parts.path.rstrip("/")
    if parts.scheme == "hf" and path.count("/") == 1:  # the repository itself is the checkpoint
        name = path.rpartition("/")[2].partition("@")[0]
        remote = _open_hub(parts, endpoint, redirect_hosts, only_name=name)
    else:
        parent, _, name = path.rpartition("/")
        name = unquote(name)
        parent_url = parts._replace(path=parent or "/").geturl()
        remote = open_remote(parent_url, endpoint=endpoint, redirect_hosts=redirect_hosts)
    if not is_legal_name(name):
        raise ConfigError(f"{_shown(parts)}: {name[:255]!r} is not a checkpoint name; end the URL with one")
    return remote, name


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(f"file://{quote(url)}" if url.startswith("/") else url)
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"a remote's URL can't be read; give one of {_SCHEMES}") from None
    has_host = bool(parts.hostname) if parts.scheme in {"http", "https", "s3", "hf"} else not parts.netloc
    if parts.scheme not in {"file", "http", "https", "s3", "hf"} or not has_host or not port_is_sound:
        raise ConfigError(f"{_shown(parts)}: not the URL of a remote; give one of {_SCHEMES}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{_shown(parts)}: a remote's URL may have no query; give credentials in another way")
    if ".." in unquote(parts.path).split("/"):
        raise ConfigError(f"{_shown(parts)}: a remote's URL may not hold `..`")
    return parts


def _shown(parts: SplitResult) -> str:
    """Return the URL without user, query and fragment."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _open_folder(folder: Path) -> Remote:
    def reader() -> ObjectStore:
        if not folder.is_dir():
            raise FileNotFoundError
        return LocalStore(folder)

    return Remote(f"file://{folder}", _ObjectSource(reader), lambda: LocalStore(folder, mkdir=True), folder)


def _open_http(parts: SplitResult, redirect_hosts: Sequence[str]) -> Remote:
    """Open a plain HTTP server; a user and password in the URL are sent as a basic-auth header."""
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Remote(_shown(parts), HttpSource(_shown(parts), headers, redirect_hosts))


def _open_hub(
    parts: SplitResult, endpoint: str | None, redirect_hosts: Sequence[str], *, only_name: str | None = None
) -> Remote:
    """Open a Hub repository. Files are at ``<endpoint>/<org>/<name>/resolve/<revision>/<path>``, which redirects."""
    from huggingface_hub import constants, get_token

    repository, *subfolder = parts.path.strip("/").split("/")
    repository, _, revision = repository.partition("@")
    if not repository:
        raise ConfigError(f"{_shown(parts)}: not the URL of a repository; give hf://org/name[@revision][/subfolder]")
    base = (endpoint or constants.ENDPOINT).rstrip("/")
    where = [parts.netloc, repository, "resolve", quote(unquote(revision or "main"), safe=""), *subfolder]
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    source = HttpSource("/".join([base, *where]), headers, (*HUB_HOSTS, *redirect_hosts))
    return Remote(_shown(parts), source, _only_name=only_name)


def _open_s3(parts: SplitResult, endpoint: str | None, redirect_hosts: Sequence[str]) -> Remote:
    """Open an S3 bucket: read through signed URLs with ``HttpSource``, written with obstore.

    obstore is not used for reads because it follows any redirect.
    """
    # Plain http is allowed: it is the operator's choice, and requests carry a signature, never the secret key.
    config: S3Config = {} if endpoint is None else {"endpoint": endpoint}
    prefix = unquote(parts.path.strip("/")) or None
    retries: RetryConfig = {"max_retries": PUT_RETRIES_MAX}
    client: ClientConfig = {"allow_http": True, "timeout": PUT_TIMEOUT}

    def store(credentials: S3Config) -> S3Store:
        both: S3Config = {**config, **credentials}
        return S3Store(parts.netloc, prefix=prefix, config=both, client_options=client, retry_config=retries)

    writer = store({})
    unknown: S3Config = {"access_key_id": "none", "secret_access_key": "none", "skip_signature": False}
    anonymous = store(unknown)  # signs with dummy keys, without looking up credentials, to learn the objects' URL

    def sign(key: str) -> str:
        return obstore.sign(writer, "GET", key, SIGNED_FOR)

    try:
        base = obstore.sign(anonymous, "GET", "x", SIGNED_FOR).partition("?")[0].removesuffix("/x")
    except BaseError:  # its text quotes the endpoint, which may hold a password
        raise ConfigError(f"{_shown(parts)}: the S3 endpoint is not a URL; check AWS_ENDPOINT_URL") from None
    is_public = (read_variable("AWS_SKIP_SIGNATURE") or "").lower() in {"1", "true", "on", "yes", "y"}
    source = HttpSource(base, {}, redirect_hosts, sign=None if is_public else sign)
    return Remote(_shown(parts), source, lambda: writer)


def _sync_file(path: Path) -> None:
    with write_errors(path):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(path.parent)


def _translated(error: Exception, shown: str) -> SllmError:
    """Translate an obstore error. Its text may contain secrets, so only the HTTP status is taken from it."""
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
    if _OTHER_RANGE.search(text):
        return RemoteCorrupt(shown, "it answers with another range than was asked for", MEND_CORRUPT)
    if status is not None:
        return error_of_status(status, shown)
    if "kind: Connect" in text:
        return RemoteUnreachable(shown, "no connection can be made", "check the URL, and whether the server runs")
    return RemoteUnreachable(shown, "the connection broke off", MEND_TRY)
