"""What must outlive a router: a few small values by name, in a file or in somebody's store. One interface, by URL.

Values are bytes of some kilobytes; there are as many as models that were deployed by hand, and one of estimates.
Nothing here is on a request's way.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import aiohttp

from sllm_vllm.errors import ConfigError
from sllm_vllm.plain_file import open_plain

VALUE_NBYTES_MAX = 16 << 20
TIMEOUT_S = 10.0
CONNECTIONS_MAX = 8
"""To a server, at once; whoever comes later waits."""
PREFIX = "sllm/"
"""Of every name, in stores that belong to others, too."""


class StateError(Exception):
    """The store does not answer, or does not do it; nothing was changed. One line."""


class StateBusy(StateError):
    """Another process uses it: try again."""


class StateFull(StateError):
    """There is no room for it: free some, and try again."""


class StateDamaged(StateError):
    """What is there is not what a router has written."""


class StateStore(Protocol):
    """Values by name. Every call raises ``StateError`` if it can't be done."""

    async def get(self, name: str) -> bytes | None:
        """A value; None if there is none."""
        ...

    async def put(self, name: str, value: bytes) -> None:
        """Set it; it is safe when this returns, as far as the store keeps anything safe."""
        ...

    async def delete(self, name: str) -> None:
        """Forget it; harmless if there is none."""
        ...

    async def items(self, prefix: str) -> dict[str, bytes]:
        """All whose names begin so."""
        ...

    async def close(self) -> None:
        """Let go of what it uses."""
        ...


class SqliteStore:
    """A file, readable by this user alone. It may be on the disk of one machine, not on a network's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def get(self, name: str) -> bytes | None:
        """See ``StateStore``."""
        rows = await self._run("SELECT value FROM state WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    async def put(self, name: str, value: bytes) -> None:
        """See ``StateStore``."""
        await self._run("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))

    async def delete(self, name: str) -> None:
        """See ``StateStore``."""
        await self._run("DELETE FROM state WHERE name = ?", (name,))

    async def items(self, prefix: str) -> dict[str, bytes]:
        """See ``StateStore``."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return dict(await self._run("SELECT name, value FROM state WHERE name >= ? AND name < ?", (prefix, end)))

    async def close(self) -> None:
        """See ``StateStore``."""

    async def _run(self, statement: str, values: tuple[str | bytes, ...]) -> list[Any]:
        return await asyncio.to_thread(self._run_here, statement, values)

    def _run_here(self, statement: str, values: tuple[str | bytes, ...]) -> list[Any]:
        try:
            with self._opened() as connection, connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise _told_by_sqlite(self._path, error) from None
        except OSError as error:
            raise StateError(f"{self._path}: it can't be used: {error.strerror}") from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        os.close(open_plain(self._path, os.O_RDWR | os.O_CREAT))  # SQLite would wait for a FIFO's other end
        with contextlib.closing(sqlite3.connect(self._path, timeout=TIMEOUT_S)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
            yield connection


def _told_by_sqlite(path: Path, error: sqlite3.Error) -> StateError:
    """SQLite's error, told apart by what has to be done (https://sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return StateBusy(
            f"{path}: another process has locked it for more than {TIMEOUT_S:g} s; end that, and try again"
        )
    if code == sqlite3.SQLITE_FULL:
        return StateFull(f"{path}: the disk is full; free some of it, and try again")
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        mend = "put a copy back, or remove it with what was deployed by hand"
        return StateDamaged(f"{path}: it is damaged ({error}); {mend}")
    return StateError(f"{path}: {error}")


class RedisStore:
    """A Redis server, by its own client."""

    def __init__(self, url: str) -> None:
        try:
            from redis import asyncio as redis
        except ModuleNotFoundError:
            raise ConfigError("redis: is not installed; add it with `pip install redis`") from None
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
        )
        self._client: Any = redis.Redis.from_pool(pool)
        self._server = _without_password(url)

    async def get(self, name: str) -> bytes | None:
        """See ``StateStore``."""
        with self._told():
            value: bytes | None = await self._client.get(PREFIX + name)
            return value

    async def put(self, name: str, value: bytes) -> None:
        """See ``StateStore``."""
        with self._told():
            await self._client.set(PREFIX + name, value)

    async def delete(self, name: str) -> None:
        """See ``StateStore``."""
        with self._told():
            await self._client.delete(PREFIX + name)

    async def items(self, prefix: str) -> dict[str, bytes]:
        """See ``StateStore``."""
        with self._told():
            pattern = "".join(f"\\{char}" if char in "*?[]\\" else char for char in PREFIX + prefix) + "*"
            names = [name async for name in self._client.scan_iter(match=pattern)]
            values = await self._client.mget(names) if names else []
        found = zip(names, values, strict=True)
        return {name.decode().removeprefix(PREFIX): value for name, value in found if value is not None}

    async def close(self) -> None:
        """See ``StateStore``."""
        await self._client.aclose()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError) as error:
            raise StateError(f"{self._server}: {error}") from None


class EtcdStore:
    """An etcd server, through the JSON gateway of its third version; ``etcds:`` is one behind TLS."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._user = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        self._server = _without_password(url).replace("etcd", "http", 1)
        self._session: aiohttp.ClientSession | None = None
        self._token: str | None = None

    async def get(self, name: str) -> bytes | None:
        """See ``StateStore``."""
        found = await self._ask("range", key=_encoded(PREFIX + name))
        return base64.b64decode(found["kvs"][0].get("value", "")) if found.get("kvs") else None

    async def put(self, name: str, value: bytes) -> None:
        """See ``StateStore``."""
        await self._ask("put", key=_encoded(PREFIX + name), value=base64.b64encode(value).decode())

    async def delete(self, name: str) -> None:
        """See ``StateStore``."""
        await self._ask("deleterange", key=_encoded(PREFIX + name))

    async def items(self, prefix: str) -> dict[str, bytes]:
        """See ``StateStore``."""
        begin = PREFIX + prefix
        end = begin[:-1] + chr(ord(begin[-1]) + 1)
        found = await self._ask("range", key=_encoded(begin), range_end=_encoded(end))
        return {
            base64.b64decode(one["key"]).decode().removeprefix(PREFIX): base64.b64decode(one.get("value", ""))
            for one in found.get("kvs", ())
        }

    async def close(self) -> None:
        """See ``StateStore``."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, what: str, **body: str) -> dict[str, Any]:
        if self._user is None:
            return await self._post(f"kv/{what}", body)
        if self._token is None:
            await self._authenticate(self._user)
        try:
            return await self._post(f"kv/{what}", body)
        except _Unauthenticated:  # a token lives for minutes
            await self._authenticate(self._user)
            return await self._post(f"kv/{what}", body)

    async def _authenticate(self, user: tuple[str, str]) -> None:
        self._token = None
        answer = await self._post("auth/authenticate", {"name": user[0], "password": user[1]})
        self._token = str(answer.get("token", ""))

    async def _post(self, what: str, body: dict[str, str]) -> dict[str, Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX)
            )
        headers = {} if self._token is None else {"Authorization": self._token}
        try:
            async with self._session.post(f"{self._server}/v3/{what}", json=body, headers=headers) as answer:
                if answer.status == 401:
                    raise _Unauthenticated(f"{self._server}: it does not know this user (any more)")
                if answer.status != 200:
                    raise StateError(f"{self._server}: it answers {answer.status}")
                found: dict[str, Any] = await answer.json(content_type=None)
                return found
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise StateError(f"{self._server}: {error or type(error).__name__}") from None


class _Unauthenticated(StateError):
    """The user is not known, or the token is too old."""


def open_state_store(url: str) -> StateStore:
    """The store that a URL names, but for ``ray:``, which `ray_state.py` knows. Nothing is asked of it yet.

    Raises:
        ConfigError: nobody knows such a URL.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        return SqliteStore(Path(rest))
    if scheme in {"redis", "rediss"}:
        return RedisStore(url)
    if scheme in {"etcd", "etcds"} and rest.startswith("//"):
        return EtcdStore(url)
    raise ConfigError(f"{_without_password(url)!r} names no store; give sqlite:PATH, redis://… or etcd://…")


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}" if parts.netloc else url
