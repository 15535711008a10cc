"""The data path on real sockets: what passes unchanged, what is tried again, and how anything can break off."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.gate import Rejected
from sllm_vllm.router.http.proxy import Report
from tests.support.fake_gate import CHAT, EngineProcess, FakeGate, Served, chat, running_engine, serving, until
from tests.support.waiting import DEADLINE_S


@pytest.fixture(scope="module")
def engines() -> Iterator[list[EngineProcess]]:
    with running_engine("a") as first, running_engine("b") as second:
        yield [first, second]


@pytest.fixture
def gate(engines: list[EngineProcess]) -> FakeGate:
    return FakeGate([(engine.name, engine.url) for engine in engines])


@pytest.fixture
def dead_url() -> Iterator[str]:
    with socket.socket() as bound:  # bound, and nobody listens
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


async def post(served: Served, body: Any, path: str = CHAT) -> tuple[int, str]:
    answer = await served.post(body, path)
    return answer.status, answer.text


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def texts(text: str) -> list[str]:
    return [event["choices"][0]["text"] for event in events(text) if event.get("choices")]


# ------------------------------------------------------------------------------------------------- what passes


async def test_body_reaches_the_engine_byte_for_byte(gate: FakeGate) -> None:
    body = b' {"model" :\t"meta/tiny", "prompt":"\xc3\xa4\\u00e4", "n":1e0, "n":1 }\r\n'
    async with serving(gate) as served:
        echo = (await served.post(body, "/v1/completions?beta=true")).json["echo"]
    assert echo["body"].encode("latin-1") == body
    assert echo["target"] == "/v1/completions?beta=true"


async def test_chunked_body_reaches_the_engine_with_a_length(gate: FakeGate) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "other", '
        yield b'"prompt": "x"}'

    async with serving(gate) as served:
        echo = (await served.post(pieces())).json["echo"]
    assert echo["body"] == '{"model": "other", "prompt": "x"}'


async def test_headers_pass_but_for_those_of_a_hop(gate: FakeGate) -> None:
    sent = {"x-vllm-priority": "3", "connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers"}
    async with serving(gate) as served:
        fake = chat(headers=[["x-engine", "yes"], ["keep-alive", "timeout=5"], ["location", "http://inner"]])
        answer = await served.post(fake, headers=sent)
    reached = {name.lower(): value for name, value in answer.json["echo"]["headers"]}
    assert reached["x-vllm-priority"] == "3"
    assert not {"x-mine", "te", "connection"} & reached.keys()
    assert answer.headers["x-engine"] == "yes"
    dropped = ("keep-alive", "location", "server", "access-control-allow-origin")
    assert [name for name in dropped if name in answer.headers] == []


async def test_request_id_is_kept_sent_on_and_answered(gate: FakeGate) -> None:
    async with serving(gate) as served:
        answer = await served.post(chat(), headers={"x-request-id": "mine-1"})
    assert answer.headers.getall("x-request-id") == ["mine-1"]
    assert [value for name, value in answer.json["echo"]["headers"] if name == "x-request-id"] == ["mine-1"]
    assert gate.facts[0].id.startswith("mine-1-")


@pytest.mark.parametrize("given", ["", "a b", "é", "x" * 129])
async def test_request_id_that_is_none_is_replaced(gate: FakeGate, given: str) -> None:
    async with serving(gate) as served:
        answer = await served.post(chat(), headers={"x-request-id": given})
    shown = answer.headers["x-request-id"]
    assert len(shown) == 32
    assert int(shown, 16) >= 0


async def test_stream_passes_unchanged(gate: FakeGate) -> None:
    async with serving(gate) as served:
        status, text = await post(served, chat(stream=True, chunks=50))
    assert status == 200
    assert texts(text) == [f"me/{number} " for number in range(50)]
    assert text.endswith("data: [DONE]\n\n")


async def test_first_event_does_not_wait_for_the_second(gate: FakeGate) -> None:
    async with serving(gate) as served, aiohttp.ClientSession() as client:
        async with client.post(served.url + CHAT, json=chat(stream=True, stalls_after=1)) as answer:
            async with asyncio.timeout(DEADLINE_S):
                assert b"me/0" in await answer.content.readuntil(b"\n\n")
        await until(lambda: gate.outcomes, "the end of the stream")
    assert gate.outcomes[0].how == "client_left"


async def test_compressed_answer_passes_as_it_is(gate: FakeGate) -> None:
    """The engine says that it is compressed and sends plain bytes: who unpacks them fails."""
    async with serving(gate) as served:
        answer = await served.post(chat(headers=[["content-encoding", "gzip"]]))
    assert answer.json["echo"]["engine"] == "a"
    assert answer.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500])
async def test_engines_own_errors_pass(gate: FakeGate, status: int) -> None:
    async with serving(gate) as served:
        answered, text = await post(served, chat(status=status))
    assert answered == status
    assert json.loads(text)["error"]["type"] == "made_up"
    assert gate.retries == []
    assert [(outcome.how, outcome.status) for outcome in gate.outcomes] == [("done", status)]


@pytest.mark.parametrize(("is_stream", "tokens"), [(False, (7, 2)), (True, (5, 3))])
async def test_outcome_tells_tokens_and_times(gate: FakeGate, is_stream: bool, tokens: tuple[int, int]) -> None:
    async with serving(gate) as served:
        await post(served, chat(stream=is_stream))
    (outcome,) = gate.outcomes
    assert (outcome.prompt_tokens, outcome.output_tokens) == tokens
    assert outcome.first_byte_s is not None
    assert 0 < outcome.first_byte_s <= outcome.seconds
    assert gate.num_first_bytes == 1


async def test_no_more_is_kept_of_an_answer_than_its_end(gate: FakeGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces of it, whole, were a megabyte for each client that reads slowly."""
    report = Report()
    monkeypatch.setattr("sllm_vllm.router.http.ingress.Report", lambda: report)
    async with serving(gate) as served:
        status, text = await post(served, chat(nbytes=4_000_000))
    assert (status, len(text)) == (200, 4_000_000)
    assert 0 < sum(map(len, report.tail_pieces)) <= 4 * 4096


async def test_200_streams_at_once_are_not_mixed_up(gate: FakeGate) -> None:
    async def one(client: aiohttp.ClientSession, url: str, number: int) -> list[str]:
        body = chat(stream=True, user=f"user{number}", chunks=10, pace_s=0.01)
        async with client.post(url, json=body, headers={"x-request-id": "same"}) as answer:
            return texts(await answer.text())

    connector = aiohttp.TCPConnector(limit=0)
    async with serving(gate) as served, aiohttp.ClientSession(connector=connector) as client:
        got = await asyncio.gather(*(one(client, served.url + CHAT, number) for number in range(200)))
    assert got == [[f"user{number}/{event} " for event in range(10)] for number in range(200)]
    assert [outcome.how for outcome in gate.outcomes] == ["done"] * 200


async def test_connections_to_an_engine_are_used_again(engines: list[EngineProcess]) -> None:
    engine = engines[0]
    before = engine.stats()["connections"]
    async with serving(FakeGate([("a", engine.url)])) as served:
        for _ in range(10):
            assert (await post(served, chat()))[0] == 200
    assert engine.stats()["connections"] - before <= 3  # two of them ask for the counts


# -------------------------------------------------------------------------------------------- what is tried again


@pytest.mark.parametrize("before", ["close", "reset", "rubbish"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_engine_that_fails_before_a_byte_is_replaced(gate: FakeGate, before: str, is_stream: bool) -> None:
    async with serving(gate) as served:
        status, text = await post(served, chat(stream=is_stream, a={"before": before}))
    assert status == 200
    assert "error" not in text
    assert len(gate.retries) == 1
    assert [outcome.how for outcome in gate.outcomes] == ["done"]


async def test_engine_that_dies_in_prefill_is_replaced(gate: FakeGate) -> None:
    """Its head was sent; no byte of its body."""
    async with serving(gate) as served:
        status, text = await post(served, chat(stream=True, a={"breaks_after": 0}))
    assert (status, texts(text)) == (200, ["me/0 ", "me/1 ", "me/2 "])
    assert gate.retries == ["it broke off"]


async def test_engine_that_is_gone_is_replaced(engines: list[EngineProcess], dead_url: str) -> None:
    gate = FakeGate([("dead", dead_url), ("b", engines[1].url)])
    async with serving(gate) as served:
        status, text = await post(served, chat())
    assert status == 200
    assert json.loads(text)["echo"]["engine"] == "b"
    assert gate.retries == ["it can't be reached"]


async def test_engine_that_shuts_down_is_replaced(gate: FakeGate) -> None:
    async with serving(gate) as served:
        status, text = await post(served, chat(a={"status": 503}))
    assert (status, json.loads(text)["echo"]["engine"]) == (200, "b")


async def test_there_is_one_retry(dead_url: str) -> None:
    gate = FakeGate([("dead", dead_url)])
    async with serving(gate) as served:
        status, text = await post(served, chat(stream=True))
    assert status == 502
    assert json.loads(text)["error"]["code"] == "engine_failed"
    assert dead_url.removeprefix("http://") not in text
    assert (len(gate.retries), gate.num_given) == (2, 2)
    assert {failure.sign for failure in gate.failures} == {FailureSign.UNREACHED}
    assert gate.outcomes == []


async def test_503_of_the_second_engine_too_is_told(gate: FakeGate) -> None:
    async with serving(gate) as served:
        status, _ = await post(served, chat(status=503))
    assert status == 503
    assert [(outcome.how, outcome.status) for outcome in gate.outcomes] == [("done", 503)]


async def test_refused_retry_is_told_and_leaves_no_ticket(gate: FakeGate) -> None:
    gate.rejects_retry = Rejected(503, "server_error", "no replica is left", retry_after_s=2.5)
    async with serving(gate) as served:
        answer = await served.post(chat(before="close"))
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert gate.outcomes == []


# ---------------------------------------------------------------------------------------------- what breaks off


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_broken_stream_ends_with_an_error_event(gate: FakeGate, how: str) -> None:
    async with serving(gate) as served:
        status, text = await post(served, chat(stream=True, chunks=5, pace_s=0.02, breaks_after=2, breaks_how=how))
    assert status == 200
    *given, last = events(text)
    assert [event["choices"][0]["text"] for event in given] == ["me/0 ", "me/1 "]
    assert last["error"]["code"] == "engine_failed"
    assert "[DONE]" not in text
    assert gate.retries == []
    assert [outcome.how for outcome in gate.outcomes] == ["engine_failed"]


async def test_error_event_of_messages_has_a_name(gate: FakeGate) -> None:
    async with serving(gate) as served:
        _, text = await post(served, chat(stream=True, breaks_after=1), "/v1/messages")
    assert "\n\nevent: error\ndata: {" in text
    assert events(text)[-1]["type"] == "error"


async def test_broken_plain_answer_does_not_look_whole(gate: FakeGate) -> None:
    async with serving(gate) as served, aiohttp.ClientSession() as client:
        asked = chat(nbytes=1_000_000, breaks_after=300_000)
        async with client.post(served.url + CHAT, json=asked) as answer:
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
    assert [outcome.how for outcome in gate.outcomes] == ["engine_failed"]


async def test_client_that_leaves_aborts_the_engines_request(gate: FakeGate, engines: list[EngineProcess]) -> None:
    aborted = engines[0].stats()["aborted"]
    async with serving(gate) as served, aiohttp.ClientSession() as client:
        answer = await client.post(served.url + CHAT, json=chat(stream=True, stalls_after=1))
        await answer.content.readuntil(b"\n\n")
        answer.close()
        await until(lambda: engines[0].stats()["aborted"] > aborted, "the abort")
        await until(lambda: gate.outcomes, "the outcome")
    assert [outcome.how for outcome in gate.outcomes] == ["client_left"]


async def test_client_that_leaves_before_the_first_byte_aborts_too(
    gate: FakeGate, engines: list[EngineProcess]
) -> None:
    running = engines[0].stats()["requests"]
    aborted = engines[0].stats()["aborted"]
    async with serving(gate) as served, aiohttp.ClientSession() as client:
        asking = asyncio.create_task(client.post(served.url + CHAT, json=chat(before="stall")))
        await until(lambda: engines[0].stats()["requests"] > running, "the request")
        asking.cancel()
        await until(lambda: engines[0].stats()["aborted"] > aborted, "the abort")
        await until(lambda: gate.outcomes, "the outcome")
    assert [(outcome.how, outcome.first_byte_s) for outcome in gate.outcomes] == [("client_left", None)]


async def test_client_that_leaves_the_queue_is_taken_out(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate) as served, aiohttp.ClientSession() as client:
        asking = asyncio.create_task(client.post(served.url + CHAT, json=chat()))
        await until(lambda: gate.num_waiting, "the request in the queue")
        asking.cancel()
        await until(lambda: not gate.num_waiting, "the empty queue")
    assert (gate.num_given, gate.outcomes) == (0, [])


async def test_slow_reader_holds_up_the_engine(gate: FakeGate, engines: list[EngineProcess]) -> None:
    """A stream of 1 GiB that nobody reads fills the sockets' buffers, and no more."""
    before = engines[0].stats()["sent_nbytes"]
    body = json.dumps(chat(stream=True, chunks=1024, pad=1 << 20)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    async with serving(gate) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 12)
        writer.write(head.encode() + body)
        await until(lambda: engines[0].stats()["is_blocked"], "the engine to be held up")
        sent = engines[0].stats()["sent_nbytes"] - before
        writer.transport.abort()
        await until(lambda: gate.outcomes, "the outcome")
    assert sent < 64 << 20
    assert [outcome.how for outcome in gate.outcomes] == ["client_left"]


async def test_reader_that_never_takes_the_end_is_left(
    gate: FakeGate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sllm_vllm.router.http.deadline.LAST_S", 0.1)
    caplog.set_level("INFO", logger="sllm_vllm.router")
    body = json.dumps(chat(stream=True, chunks=1024, pad=1 << 20)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    async with serving(gate, IngressSettings(request_timeout=1, drain_s=1)) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 12)
        writer.write(head.encode() + body)
        await until(lambda: "outcome=timeout" in caplog.text, "the end of the request")
        writer.transport.abort()
    assert [outcome.how for outcome in gate.outcomes] == ["timeout"]


# ------------------------------------------------------------------------------------------------------- times


async def test_engine_that_pauses_too_long_in_a_stream(gate: FakeGate) -> None:
    async with serving(gate, IngressSettings(idle_timeout=0.2, drain_s=1)) as served:
        status, text = await post(served, chat(stream=True, stalls_after=1))
    assert status == 200
    assert events(text)[-1]["error"]["code"] == "timeout"
    assert [outcome.how for outcome in gate.outcomes] == ["timeout"]


async def test_engine_that_does_not_begin(gate: FakeGate) -> None:
    async with serving(gate, IngressSettings(request_timeout=0.2, drain_s=1)) as served:
        status, text = await post(served, chat(before="stall"))
    assert status == 504
    assert json.loads(text)["error"]["code"] == "timeout"
    assert [outcome.how for outcome in gate.outcomes] == ["timeout"]
    assert gate.retries == []


async def test_waiting_counts_for_the_whole_time(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate, IngressSettings(request_timeout=0.2, drain_s=1)) as served:
        status, _ = await post(served, chat())
    assert status == 504
    assert gate.num_given == 0


async def test_limits_that_are_kept_change_nothing(gate: FakeGate) -> None:
    """The stream takes longer than its limit between two pieces."""
    async with serving(gate, IngressSettings(idle_timeout=2, drain_s=1)) as served:
        status, text = await post(served, chat(stream=True, chunks=100, pace_s=0.03))
    assert (status, len(texts(text))) == (200, 100)
    assert [outcome.how for outcome in gate.outcomes] == ["done"]
