"""What must outlive a router: a few small named values, in a file or in an external store chosen by URL.

Values are bytes, some kilobytes each: one for each model that was deployed by hand, and one for the estimates. No
request waits for anything here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sllm_vllm.daemon.plain_file import open_plain
from sllm_vllm.errors import ConfigError

VALUE_NBYTES_MAX = 16 << 20
TIMEOUT_S = 10.0
CONNECTIONS_MAX = 8
"""Concurrent connections to a server; further calls wait."""
PREFIX = "sllm/"
"""Prefix of every name in stores that are shared with others."""


class StateError(Exception):
    """The store does not answer, or refuses; nothing was changed. The message is one line."""


class StateBusy(StateError):
    """Another process uses the store: retry."""


class StateFull(StateError):
    """The store has no room for a value: free some, and retry."""


class StateDamaged(StateError):
    """The store's contents are not what a router has written."""


class StateStore(Protocol):
    """Values by name. Every method raises ``StateError`` if it fails."""

    async def get(self, name: str) -> bytes | None:
        """The value of a name; None if there is none."""
        ...

    async def put(self, name: str, value: bytes) -> None:
        """Set a value. When this returns it is as durable as the store makes it."""
        ...

    async def delete(self, name: str) -> None:
        """Delete a value, if there is one."""
        ...

    async def items(self, prefix: str) -> dict[str, bytes]:
        """All values whose names begin with ``prefix``, by name."""
        ...

    async def close(self) -> None:
        """Close connections to the store."""
        ...


class SqliteStore:
    """A file, readable by this user alone. It must be on a local disk, not on a network file system."""

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
        os.close(open_plain(self._path, os.O_RDWR | os.O_CREAT))  # refuse a FIFO, on which SQLite would block
        with contextlib.closing(sqlite3.connect(self._path, timeout=TIMEOUT_S)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
            yield connection


def _told_by_sqlite(path: Path, error: sqlite3.Error) -> StateError:
    """SQLite's error as one of ours, by what has to be done about it (https://sqlite.org/rescode.html)."""
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
    """A Redis server, through the ``redis`` package."""

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


def open_state_store(url: str) -> StateStore:
    """The store that a URL names, except ``ray:``, which ``ray/state.py`` handles. Does not connect to it yet.

    Raises:
        ConfigError: the URL names no known kind of store.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        return SqliteStore(Path(rest))
    if scheme in {"redis", "rediss"}:
        return RedisStore(url)
    raise ConfigError(f"{_without_password(url)!r} names no store; give sqlite:PATH or redis://…")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}" if parts.netloc else url
