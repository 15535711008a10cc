"""Requests that mean one thing to a proxy and another to what is behind it: raw bytes against a real ingress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from sllm_vllm.router.config.settings import IngressSettings
from tests.support.cases import every_case
from tests.support.fake_gate import CHAT, EngineProcess, FakeGate, Served, chat, running_engine, serving, until
from tests.support.waiting import DEADLINE_S

BODY = json.dumps(chat()).encode()
JSON = b"host: x\r\ncontent-type: application/json\r\n"
SIZED = JSON + b"content-length: %d\r\n" % len(BODY)
ALLOWED = ("/v1/", "/score", "/tokenize")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine() as process:
        yield process


@pytest.fixture
def gate(engine: EngineProcess) -> FakeGate:
    return FakeGate([("a", engine.url)])


async def exchange(served: Served, data: bytes) -> bytes:
    """All that comes back until the ingress hangs up, or nothing more is to come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(data)
    async with asyncio.timeout(DEADLINE_S):
        answer = await reader.read()
    writer.close()
    return answer


async def statuses(served: Served, data: bytes) -> list[int]:
    """Of all the answers to what was sent on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(data)
    async with asyncio.timeout(DEADLINE_S):
        answer = await reader.read()
    writer.close()
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def request(path: bytes = CHAT.encode(), head: bytes = SIZED, body: bytes = BODY) -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\nconnection: close\r\n" + head + b"\r\n" + body


CHUNKED = JSON + b"transfer-encoding: chunked\r\n"
WHOLE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@every_case(
    "data",
    [
        request(head=SIZED + b"transfer-encoding: chunked\r\n", body=WHOLE_CHUNK),
        request(head=b"transfer-encoding: chunked\r\n" + SIZED, body=WHOLE_CHUNK),
        request(head=SIZED + b"content-length: 3\r\n"),
        request(head=SIZED + SIZED),
        request(head=JSON + b"content-length: -1\r\n"),
        request(head=JSON + b"content-length: +5\r\n"),
        request(head=JSON + b"content-length: 0x10\r\n"),
        request(head=JSON + b"content-length: 5, 5\r\n"),
        request(head=JSON + b"transfer-encoding: chunked, identity\r\n", body=WHOLE_CHUNK),
        request(head=JSON + b"transfer-encoding: xchunked\r\n", body=WHOLE_CHUNK),
        request(head=JSON + b"transfer-encoding : chunked\r\n", body=WHOLE_CHUNK),
        request(head=CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"),
        request(head=CHUNKED, body=b"-1\r\n{}\r\n0\r\n\r\n"),
        request(head=CHUNKED, body=b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
        request(head=CHUNKED, body=b"2\r\n{}abc\r\n0\r\n\r\n"),
        request(head=SIZED + b"x-a: b\x00c\r\n"),
        request(head=SIZED + b"x-a: b\rc: d\r\n"),
        request(head=SIZED + b"x\x00a: b\r\n"),
        request(head=SIZED + b"no colon\r\n"),
        request(head=b" folded: yes\r\n" + SIZED),
        b"POST " + CHAT.encode() + b" HTTP/3.7\r\n" + SIZED + b"\r\n" + BODY,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_framing_that_can_be_read_two_ways_is_refused(gate: FakeGate, data: bytes) -> None:
    async with serving(gate) as served:
        got = await statuses(served, data)
    assert got == [400]
    assert gate.num_given == 0


@every_case(
    "path",
    [
        b"/v1/../sleep",
        b"/v1/%2e%2e/sleep",
        b"/v1/..%2fsleep",
        b"/v1/./chat/completions",
        b"/v1//chat/completions",
        b"//v1/chat/completions",
        b"/v1/chat/completions/",
        b"/v1/chat%2fcompletions",
        b"/v1/%63hat/completions",
        b"/v1/chat\\completions",
        b"/v1/chat;x/completions",
        b"/v1/.hidden",
        b"/v1",
        b"/v1/",
        b"/V1/chat/completions",
        b"/sleep",
        b"/wake_up",
        b"/collective_rpc",
        b"/reset_prefix_cache",
        b"/pause",
        b"/server_info",
        b"/invocations",
        b"/metrics",
        b"/load",
        b"/version",
        b"/abort_requests",
        b"/update_weights",
        b"/inference/v1/generate",
        b"/sllm/info",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter",
        b"/stats",
        b"http://other/sleep",
    ],
)
async def test_nothing_else_of_an_engine_can_be_reached(gate: FakeGate, path: bytes) -> None:
    async with serving(gate) as served:
        got = await statuses(served, request(path))
    assert got == [404]
    assert gate.facts == []


@every_case(
    "path, reached",
    [
        (b"/v1/chat/completions", "/v1/chat/completions"),
        (b"http://other/v1/completions", "/v1/completions"),
        (b"/v1/completions?a=/../sleep", "/v1/completions?a=/../sleep"),
        (b"/v1/completions#/../sleep", "/v1/completions"),
        (b"/score", "/score"),
        (b"/v2/rerank", "/v2/rerank"),
    ],
)
async def test_path_reaches_the_engine_as_it_is_listed(gate: FakeGate, path: bytes, reached: str) -> None:
    async with serving(gate) as served:
        answer = await exchange(served, request(path))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["echo"]["target"] == reached


async def test_length_of_the_body_is_what_was_read(gate: FakeGate) -> None:
    """What follows a body is a request of its own, and never reaches an engine as a part of the first."""
    hidden = b"POST /sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    async with serving(gate) as served:
        answer = await exchange(served, request() + hidden)
    echo = json.loads(answer.partition(b"\r\n\r\n")[2])["echo"]
    assert echo["body"].encode() == BODY
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_second_request_before_the_first_answer_is_dropped(gate: FakeGate, engine: EngineProcess) -> None:
    """And the first one's client is still seen to leave."""
    asked = json.dumps(chat(before="stall")).encode()
    first = b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"content-length: %d\r\n\r\n" % len(asked) + asked
    async with serving(gate) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(first + first)
        await until(lambda: gate.tickets, "the first request")
        writer.transport.abort()
        await until(lambda: gate.outcomes, "its outcome")
    assert [outcome.how for outcome in gate.outcomes] == ["client_left"]
    assert len(gate.facts) == 1


async def test_trailers_are_no_headers(gate: FakeGate) -> None:
    pieces = b"%x\r\n%b\r\n0\r\nx-late: 1\r\nauthorization: Bearer late\r\n\r\n" % (len(BODY), BODY)
    async with serving(gate) as served:
        answer = await exchange(served, request(head=CHUNKED, body=pieces))
    reached = json.loads(answer.partition(b"\r\n\r\n")[2])["echo"]["headers"]
    assert "late" not in str(reached)


@pytest.mark.parametrize(
    "head",
    [
        b"x-a: " + b"b" * 5000 + b"\r\n",
        b"x-a: b\r\n" * 1000,
        b"x-a: " + b"b" * 3_000_000,
    ],
)
async def test_large_head_is_refused(gate: FakeGate, head: bytes) -> None:
    async with serving(gate, IngressSettings(head_nbytes_max=4096, drain_s=1)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n")
        async with asyncio.timeout(DEADLINE_S):
            assert (await reader.readuntil(b"\r\n")).split()[1] == b"431"
        writer.close()


@pytest.mark.parametrize(("data", "answers"), [(b"", []), (b"GET /health HTTP/1.1\r\nhost:", [408])])
async def test_slow_head_is_refused(gate: FakeGate, data: bytes, answers: list[int]) -> None:
    async with serving(gate, IngressSettings(head_s_max=0.1, drain_s=1)) as served:
        got = await statuses(served, data)
    assert got == answers


async def test_slow_body_is_refused(gate: FakeGate) -> None:
    async with serving(gate, IngressSettings(body_timeout=0.1, drain_s=1)) as served:
        got = await statuses(served, request(body=BODY[:10]))
    assert got == [408]
    assert gate.facts == []


async def test_one_connection_too_many_is_closed(gate: FakeGate) -> None:
    async with serving(gate, IngressSettings(connections_max=1, drain_s=1)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
        assert await statuses(served, b"") == []
        writer.close()
