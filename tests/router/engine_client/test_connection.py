"""Connections to engines, against a server that says what a test gives it, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from sllm_vllm.daemon.unix_listener import url_of_socket
from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.engine_client.connection import (
    HEAD_NBYTES_MAX,
    READ_AT_ONCE_NBYTES,
    READ_NBYTES,
    EngineConnection,
    EngineFailed,
    Upstream,
)
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S, wait_until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSES = b"<close>"


class Way:
    """Where servers of a test listen."""

    folder: Path | None = None
    """Of Unix sockets; None: on ports."""


WAY = Way()


@pytest.fixture(autouse=True, params=["port", "socket"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests of this file run with servers of both kinds."""
    monkeypatch.setattr(WAY, "folder", tmp_path if request.param == "socket" else None)


@contextlib.contextmanager
def bound() -> Iterator[tuple[socket.socket, str]]:
    """A socket that does not listen yet, and its URL."""
    with socket.socket(socket.AF_UNIX if WAY.folder else socket.AF_INET) as server:
        if WAY.folder is None:
            server.bind(("127.0.0.1", 0))
            yield server, "http://127.0.0.1:{1}".format(*server.getsockname())
        else:
            path = WAY.folder / "a socket, 100%"
            server.bind(str(path))
            yield server, url_of_socket(path)


async def serving(
    connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> tuple[asyncio.Server, str]:
    """A server and its URL."""
    if WAY.folder is None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        return server, "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    path = WAY.folder / "engine"
    return await asyncio.start_unix_server(connection, path), url_of_socket(path)


@dataclass
class Script:
    """What is said to each request in turn; the last for all after it. ``CLOSES`` at its end hangs up."""

    answers: list[bytes]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                writer.write(answer.removesuffix(CLOSES))
                if answer.endswith(CLOSES):
                    break
        writer.close()


@contextlib.asynccontextmanager
async def scripted(*answers: bytes, keep_alive_s: float = 60.0) -> AsyncIterator[tuple[Upstream, Script]]:
    script = Script(list(answers))
    server, script.url = await serving(script.connection)
    upstream = Upstream(keep_alive_s)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield upstream, script
    finally:
        upstream.close()
        server.close()


async def ask(upstream: Upstream, script: Script, body: bytes = b"{}") -> tuple[int, bytes]:
    answer = await upstream.post(script.url, target="/v1/x", headers=[(b"x-a", b"b")], body=body)
    read = await read_all(answer)
    answer.close()
    return answer.status, read


async def read_all(answer: EngineConnection) -> bytes:
    pieces = []
    while piece := await answer.read():
        pieces.append(piece)
    return b"".join(pieces)


async def test_request_is_written_plainly() -> None:
    async with scripted(OK) as (upstream, script):
        assert await ask(upstream, script) == (200, b"ok")
    host = b"localhost" if WAY.folder else script.url.removeprefix("http://").encode()
    assert script.requests == [
        b"POST /v1/x HTTP/1.1\r\nhost: " + host + b"\r\nx-a: b\r\ncontent-length: 2\r\n\r\n{}",
    ]


async def test_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * (READ_NBYTES // 64)
    async with scripted(OK) as (upstream, script):
        assert await ask(upstream, script, body) == (200, b"ok")
    assert script.requests[0].endswith(b"\r\n\r\n" + body)


@every_case(
    "answer, body",
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-late: 1\r\n\r\n", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nok" + CLOSES, b"ok"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + CLOSES, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
async def test_every_framing_is_read(answer: bytes, body: bytes) -> None:
    async with scripted(answer) as (upstream, script):
        assert (await ask(upstream, script))[1] == body


@every_case(
    "answer",
    [
        CLOSES,
        b"HTTP/1.1 200" + CLOSES,
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok" + CLOSES,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n" + CLOSES,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (2 * HEAD_NBYTES_MAX),
    ],
)
async def test_anything_else_is_a_failure(answer: bytes) -> None:
    async with scripted(answer) as (upstream, script):
        with pytest.raises(EngineFailed, match=r"^its? "):
            await ask(upstream, script)


async def test_what_came_before_the_end_is_still_read() -> None:
    async with scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok" + CLOSES) as (upstream, script):
        answer = await upstream.post(script.url, target="/v1/x", headers=[], body=b"")
        assert await answer.read() == b"ok"
        with pytest.raises(EngineFailed):
            await answer.read()


async def test_connection_serves_one_request_after_another() -> None:
    async with scripted(OK) as (upstream, script):
        assert [await ask(upstream, script) for _ in range(3)] == [(200, b"ok")] * 3
    assert script.num_connections == 1


@every_case(
    "first",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstale",
    ],
)
async def test_connection_is_not_used_again_when_it_should_not(first: bytes) -> None:
    async with scripted(first, OK) as (upstream, script):
        assert [await ask(upstream, script) for _ in range(2)] == [(200, b"ok")] * 2
    assert script.num_connections == 2


async def test_connection_that_the_engine_closed_meanwhile_is_no_failure() -> None:
    """The second request meets an end; a new connection takes it."""
    async with scripted(OK, CLOSES, OK) as (upstream, script):
        assert [await ask(upstream, script) for _ in range(2)] == [(200, b"ok")] * 2
    assert (script.num_connections, len(script.requests)) == (2, 3)


async def test_new_connection_that_ends_is_a_failure() -> None:
    async with scripted(CLOSES) as (upstream, script):
        with pytest.raises(EngineFailed, match="broke off"):
            await ask(upstream, script)
    assert len(script.requests) == 1


async def test_idle_connection_is_closed_after_a_time() -> None:
    async with scripted(OK, keep_alive_s=0.05) as (upstream, script):
        await ask(upstream, script)
        await script.writers[0].wait_closed()
        await ask(upstream, script)
    assert script.num_connections == 2


async def test_answer_that_is_not_read_to_its_end_closes_the_connection() -> None:
    async with scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok") as (upstream, script):
        answer = await upstream.post(script.url, target="/v1/x", headers=[], body=b"")
        answer.close()
        await script.writers[0].wait_closed()
        assert await answer.read() == b"ok"
        with pytest.raises(EngineFailed):
            await answer.read()


async def test_closed_pool_keeps_nothing() -> None:
    async with scripted(OK) as (upstream, script):
        await ask(upstream, script)
        upstream.close()
        await script.writers[0].wait_closed()
        await ask(upstream, script)
        await script.writers[1].wait_closed()
    assert script.num_connections == 2


async def test_read_ahead_of_a_reader_that_stalls_is_bounded() -> None:
    nbytes = 4 << 20
    large = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % nbytes + b"x" * nbytes
    async with scripted(large) as (upstream, script):
        answer = await upstream.post(script.url, target="/v1/x", headers=[], body=b"{}")
        await asyncio.to_thread(wait_until, lambda: len(answer.peek()) > READ_NBYTES, "it to be held up")
        for _ in range(1000):  # what could come meanwhile, would
            await asyncio.sleep(0)
        assert READ_NBYTES <= len(answer.peek()) <= READ_NBYTES + READ_AT_ONCE_NBYTES
        assert len(await read_all(answer)) == nbytes


async def test_an_engine_that_ended_while_idle_never_got_the_request() -> None:
    """Its end lies unread in the socket: the request must not be suspected of it, and quarantined."""
    upstream = Upstream()
    with bound() as (server, url):
        server.listen()
        asked = asyncio.create_task(upstream.post(url, target="/", headers=[], body=b"{}"))
        engine, _ = await asyncio.to_thread(server.accept)
        await asyncio.to_thread(engine.recv, 65536)
        engine.sendall(OK)
        answer = await asked
        await read_all(answer)
        answer.close()
        engine.close()
    with pytest.raises(EngineFailed) as failed:  # no turn of the event loop lies between the engine's end and this
        await upstream.post(url, target="/", headers=[], body=b"{}")
    assert failed.value.sign is FailureSign.UNREACHED
    upstream.close()


async def test_what_an_idle_connection_swallowed_may_have_ended_its_engine() -> None:
    """Nothing came back and nobody listens any more: that it could not be sent again does not make it innocent."""
    asked: list[bytes] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            if asked:
                server.close()
                writer.close()
                return
            asked.append(head)
            writer.write(OK)

    server, url = await serving(connection)
    upstream = Upstream()
    answer = await upstream.post(url, target="/", headers=[], body=b"{}")
    await read_all(answer)
    answer.close()
    for sign in (FailureSign.BROKE_OFF, FailureSign.UNREACHED):
        with pytest.raises(EngineFailed) as failed:
            await upstream.post(url, target="/", headers=[], body=b"{}")
        assert failed.value.sign is sign
    upstream.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_full_queue_of_connections_is_waited_for(run: Callable[[Any], None]) -> None:
    """Linux refuses a Unix socket's one too many at once; that says nothing against the engine."""

    async def work() -> None:
        upstream = Upstream()
        with bound() as (server, url):
            server.listen(0)
            asked = [asyncio.create_task(upstream.post(url, target="/", headers=[], body=b"{}")) for _ in range(4)]
            for _ in range(100):  # often enough that a refused connection would show
                await asyncio.sleep(0.001)
            assert not any(one.done() for one in asked)
            async with asyncio.timeout(DEADLINE_S):
                for _ in asked:
                    engine, _ = await asyncio.to_thread(server.accept)
                    with engine:
                        await asyncio.to_thread(engine.recv, 65536)
                        engine.sendall(OK)
                for one in asked:
                    assert await read_all(await one) == b"ok"
        upstream.close()

    run(work())


async def test_a_server_that_does_not_listen_or_has_gone_is_not_reached() -> None:
    upstream = Upstream()

    async def sign_of(url: str) -> FailureSign:
        with pytest.raises(EngineFailed, match="can't be reached") as failed:
            await upstream.post(url, target="/", headers=[], body=b"{}")
        return failed.value.sign

    with bound() as (_, url):
        assert await sign_of(url) is FailureSign.UNREACHED
    assert await sign_of(f"{url}0" if WAY.folder else url) is FailureSign.UNREACHED
    upstream.close()
