"""Where a router's state is kept: every kind of store by the same tests, against its real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.state import store as state_store
from sllm_vllm.router.state.store import (
    RedisStore,
    SqliteStore,
    StateBusy,
    StateDamaged,
    StateError,
    StateFull,
    StateStore,
    open_state_store,
)
from tests.support.cases import every_case
from tests.support.servers import redis_server

PASSWORD = "not-for-logs"
KINDS = ("sqlite", "redis")
ODD = "models/a*b?[c]\\d/\u00e9"


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server(PASSWORD) as url:
        yield url


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:{tmp_path / 'state'}" if request.param == "sqlite" else str(request.getfixturevalue("redis_url"))


@pytest.fixture
async def store(url: str) -> AsyncIterator[StateStore]:
    """An empty one."""
    opened = open_state_store(url)
    for name in [*await opened.items("models/"), *await opened.items("other/")]:
        await opened.delete(name)
    yield opened
    await opened.close()


async def test_what_was_put_is_there_for_whoever_comes_later(store: StateStore, url: str) -> None:
    await store.put("models/a", b"1")
    await store.put("models/a", b"\x00\xff two")
    later = open_state_store(url)
    assert await later.get("models/a") == b"\x00\xff two"
    await later.close()


async def test_what_was_deleted_or_never_was_is_nothing(store: StateStore) -> None:
    await store.put("models/a", b"1")
    for _ in range(2):
        await store.delete("models/a")
    assert await store.get("models/a") is None
    assert await store.items("models/") == {}


async def test_an_empty_value_is_a_value(store: StateStore) -> None:
    await store.put("models/a", b"")
    assert await store.get("models/a") == b""
    assert await store.items("models/") == {"models/a": b""}


async def test_items_are_those_that_begin_so(store: StateStore) -> None:
    wanted = {ODD: b"1", "models/": b"2", "models/" + "x" * 300: b"3"}
    for name, value in {**wanted, "other/a": b"4", "models": b"5"}.items():
        await store.put(name, value)
    assert await store.items("models/") == wanted
    assert await store.items(ODD) == {ODD: b"1"}
    await store.delete("models")


async def test_a_large_value_and_many_of_them(store: StateStore) -> None:
    large = bytes(range(256)) * 4000
    await store.put("models/large", large)
    await asyncio.gather(*(store.put(f"other/{num}", b"%d" % num) for num in range(200)))
    assert await store.get("models/large") == large
    assert await store.items("other/") == {f"other/{num}": b"%d" % num for num in range(200)}


def test_a_file_is_this_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    asyncio.run(SqliteStore(path).put("a", b"1"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_something_else_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StateDamaged, match=r"state: it is damaged \(file is not a database\); put a copy back"):
        asyncio.run(SqliteStore(path).get("a"))
    assert path.read_bytes() == b"no database" * 100


def test_a_file_that_another_process_has_locked_is_waited_for_and_then_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_store, "TIMEOUT_S", 0.2)
    store = SqliteStore(tmp_path / "state")
    asyncio.run(store.put("a", b"1"))
    with contextlib.closing(sqlite3.connect(tmp_path / "state")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateBusy, match="state: another process has locked it"):
            asyncio.run(store.put("a", b"2"))
    assert asyncio.run(store.get("a")) == b"1"


class SmallDisk(SqliteStore):
    """SQLite finds no room for more than a few pages."""

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with super()._opened() as connection:
            connection.execute("PRAGMA max_page_count = 4")
            yield connection


def test_a_disk_that_is_full_is_told_apart_and_loses_nothing(tmp_path: Path) -> None:
    store = SmallDisk(tmp_path / "state")
    asyncio.run(store.put("a", b"1"))
    with pytest.raises(StateFull, match="state: the disk is full"):
        asyncio.run(store.put("a", b"2" * (1 << 16)))
    assert asyncio.run(store.get("a")) == b"1"


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state")
    with pytest.raises(StateError, match="state: it can't be used: it is not a regular file"):
        asyncio.run(SqliteStore(tmp_path / "state").get("a"))


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = RedisStore(f"redis://:{PASSWORD}@127.0.0.1:{port}")
    with pytest.raises(StateError) as caught:
        await store.get("a")
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert PASSWORD not in str(caught.value)
    await store.close()


async def test_a_wrong_password_is_refused(redis_url: str) -> None:
    store = RedisStore(redis_url.replace(PASSWORD, "wrong"))
    with pytest.raises(StateError, match="invalid username-password pair"):
        await store.put("a", b"1")
    await store.close()


@every_case("url", ["", "file:/a", "sqlite:", "etcd://host:2379", "http://a"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="names no store"):
        open_state_store(url)


def test_a_refused_url_is_told_without_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        open_state_store(f"mysql://user:{PASSWORD}@host:1/a")
    assert str(caught.value) == "'mysql://host:1' names no store; give sqlite:PATH or redis://…"
