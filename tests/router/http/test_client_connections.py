"""Clients' connections: offers of another protocol, half-closed ones, those that take nothing, and one too many."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.http.client_state import ClientCounts
from tests.support.fake_gate import CHAT, EngineProcess, FakeGate, Served, chat, running_engine, serving, until
from tests.support.waiting import DEADLINE_S

BODY = json.dumps(chat()).encode()
JSON = b"host: x\r\ncontent-type: application/json\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
"""What java.net.http.HttpClient adds to its first request."""
LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine() as process:
        yield process


@pytest.fixture
def gate(engine: EngineProcess) -> FakeGate:
    return FakeGate([("a", engine.url)])


def sized(body: bytes) -> bytes:
    return b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes) -> bytes:
    return b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next answer with a Content-Length, interim ones skipped."""
    status = 100
    while status == 100:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split()[1])
    num = int(head.partition(b"content-length: ")[2].split(b"\r")[0])
    return status, await reader.readexactly(num)


# ------------------------------------------------------------------------------------------ offers of another protocol


@pytest.mark.parametrize("framed", [sized, chunked])
@pytest.mark.parametrize("num_pieces", [1, 2, 40])
async def test_request_that_offers_h2c_is_answered_in_http_1_with_its_body_whole(
    gate: FakeGate, framed: object, num_pieces: int
) -> None:
    assert callable(framed)
    data = LINE + JSON + H2C + framed(BODY)
    async with serving(gate) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        size = -(-len(data) // num_pieces)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            status, body = await answer_of(reader)
            assert status == 200
            assert json.loads(body)["echo"]["body"].encode() == BODY
            writer.write(LINE + JSON + sized(BODY))  # the connection stays, and so does its framing
            assert (await answer_of(reader))[0] == 200
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n" + H2C + b"\r\n")
            assert (await answer_of(reader))[0] == 200
        writer.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_with_http2_gets_its_answer(gate: FakeGate) -> None:
    async with serving(gate) as served:
        words = ["--http2", "-sS", "-H", "content-type: application/json", "-d", BODY.decode(), f"{served.url}{CHAT}"]
        process = await asyncio.create_subprocess_exec("curl", *words, stdout=asyncio.subprocess.PIPE)
        said, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert json.loads(said)["echo"]["body"].encode() == BODY


async def test_nothing_is_smuggled_behind_an_offer(gate: FakeGate) -> None:
    """A second request behind the body is dropped, as it is without an offer."""
    data = LINE + JSON + H2C + sized(BODY) + LINE + JSON + H2C + sized(BODY)
    async with serving(gate) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(data)
        async with asyncio.timeout(DEADLINE_S):
            assert (await reader.read()).count(b"HTTP/1.1 200") == 1
        writer.close()
    assert len(gate.facts) == 1


async def test_connect_is_refused_and_nothing_after_it_is_read(gate: FakeGate) -> None:
    async with serving(gate) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n" + LINE + JSON + sized(BODY))
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.read()
        writer.close()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.split()[1] in {b"400", b"404", b"405"}
    assert gate.facts == []


async def test_two_host_headers_are_refused(gate: FakeGate) -> None:
    async with serving(gate) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(LINE + JSON + b"Host: y\r\n" + sized(BODY))
        async with asyncio.timeout(DEADLINE_S):
            status, body = await answer_of(reader)
        writer.close()
    assert status == 400
    assert "Host" in json.loads(body)["error"]["message"]
    assert gate.facts == []


# ----------------------------------------------------------------------------------------------------- half-closed ones


async def half_closed(served: Served, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(LINE + JSON + sized(body))
    writer.write_eof()
    return reader, writer


async def test_client_that_ends_its_side_gets_its_answer(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate) as served:
        reader, writer = await half_closed(served, BODY)
        await until(lambda: gate.num_waiting, "the request to wait")
        await asyncio.sleep(0.5)  # several probes find it there
        gate.released.set()
        async with asyncio.timeout(DEADLINE_S):
            assert (await answer_of(reader))[0] == 200
            assert await reader.read() == b""  # no other request can come
        writer.close()


async def test_client_that_ends_its_side_gets_its_stream(gate: FakeGate) -> None:
    async with serving(gate) as served:
        reader, writer = await half_closed(served, json.dumps(chat(stream=True, chunks=50, pace_s=0.01)).encode())
        async with asyncio.timeout(DEADLINE_S):
            assert b"[DONE]" in await reader.read()
        writer.close()


async def test_client_that_leaves_once_its_answer_has_begun_is_not_taken_for_half_closed(gate: FakeGate) -> None:
    async with serving(gate) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(LINE + JSON + sized(json.dumps(chat(stream=True, stalls_after=1)).encode()))
        async with asyncio.timeout(DEADLINE_S):
            await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: gate.outcomes, "the request to end")


async def test_client_that_has_left_is_told_apart_from_one_that_ended_its_side(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate) as served:
        _, writer = await half_closed(served, BODY)
        await until(lambda: gate.num_waiting, "the request to wait")
        writer.close()
        await until(lambda: not gate.num_waiting, "the request to end")
        gate.released.set()


# -------------------------------------------------------------------------------------------- clients that take nothing


async def stalled(served: Served, body: bytes, *, buffer_nbytes: int = 4096) -> socket.socket:
    """A connection whose client has sent a request and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_nbytes)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", served.port))
    await loop.sock_sendall(client, LINE + JSON + sized(body))
    return client


@pytest.mark.parametrize("wish", [{"stream": True, "chunks": 20_000, "pad": 4096}, {"nbytes": 64 << 20}])
async def test_stream_whose_client_takes_nothing_is_ended(
    gate: FakeGate, engine: EngineProcess, wish: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    settings = IngressSettings(slow_client_timeout=1.0, drain_s=1)
    async with serving(gate, settings) as served:
        with closing(await stalled(served, json.dumps(chat(**wish)).encode())):  # type: ignore[arg-type]
            await until(lambda: gate.outcomes, "the request to end")
            assert served.counts.num_slow == 1
    assert [outcome.how for outcome in gate.outcomes] == ["client_slow"]
    assert caplog.text.count("event=slow_client_ended") == 1
    await until(lambda: engine.stats()["running"] == 0, "the engine to have ended it")


async def test_client_that_reads_slowly_is_not_ended(gate: FakeGate) -> None:
    """It takes twice as long as the limit, and something now and then."""
    settings = IngressSettings(slow_client_timeout=2.0, drain_s=1)
    nbytes = 8 << 20
    async with serving(gate, settings) as served:
        body = json.dumps(chat(nbytes=nbytes)).encode()
        with closing(await stalled(served, body, buffer_nbytes=1 << 18)) as client:
            loop = asyncio.get_running_loop()
            began_s, num = loop.time(), 0
            while num < nbytes:
                num += len(await loop.sock_recv(client, 1 << 16))
                await asyncio.sleep(0.03)
            assert loop.time() - began_s > settings.slow_client_timeout
    assert num >= nbytes
    assert [outcome.how for outcome in gate.outcomes] == ["done"]


async def test_last_bytes_of_a_client_that_reads_slowly_outlast_the_keep_alive(gate: FakeGate) -> None:
    """The answer is complete for the router; its client takes some of it now and then, for longer than idle connections
    stay."""
    settings = IngressSettings(slow_client_timeout=30.0, keep_alive_s=1, drain_s=1)
    gate.models = [f"model-{number:060}" for number in range(60_000)]
    async with serving(gate, settings) as served:
        client, loop = socket.socket(), asyncio.get_running_loop()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        with closing(client):
            await loop.sock_connect(client, ("127.0.0.1", served.port))
            client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            got, began_s = b"", loop.time()
            while piece := await loop.sock_recv(client, 1 << 16):
                got += piece
                if loop.time() - began_s < 3 * settings.keep_alive_s:
                    await asyncio.sleep(0.1)
        body = got.partition(b"\r\n\r\n")[2]
        assert len(json.loads(body)["data"]) == len(gate.models)
        assert served.counts.num_slow == 0


async def test_last_bytes_that_a_client_does_not_take_do_not_keep_its_connection(gate: FakeGate) -> None:
    """The answer is complete for the router, and less than the transport's limit is left."""
    settings = IngressSettings(slow_client_timeout=0.5, keep_alive_s=1, drain_s=1)
    gate.models = [f"model-{number:060}" for number in range(60_000)]
    async with serving(gate, settings) as served:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        with closing(client):
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", served.port))
            client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: served.counts.num_slow == 1, "the connection to be ended")
            await until(lambda: served.counts.num_open == 0, "the connection to be closed")


# ------------------------------------------------------------------------------------------------------- one too many


async def test_connections_over_the_limit_are_counted_and_logged_once_in_a_while(
    gate: FakeGate, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(gate, IngressSettings(connections_max=1, drain_s=1)) as served:
        _, first = await asyncio.open_connection("127.0.0.1", served.port)
        await until(lambda: served.counts.num_open == 1, "the first")
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            async with asyncio.timeout(DEADLINE_S):
                assert await reader.read() == b""
            writer.close()
        assert served.counts.num_refused == 20
        first.close()
    assert 1 <= caplog.text.count("event=connections_refused") < 20


def test_a_later_line_says_how_many_were_refused_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    counts = ClientCounts()
    for at_s in (0.0, 1.0, 2.0, 60.0):
        counts.refuse(8, at_s)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "event=connections_refused num=1 connections_max=8",
        "event=connections_refused num=3 connections_max=8",
    ]
