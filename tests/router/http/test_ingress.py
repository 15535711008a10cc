"""The front on real sockets: its own routes, its errors, its limits, real clients, and rubbish of every kind."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from sllm_vllm.router.config.keys import digest_of
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.gate import Rejected
from sllm_vllm.router.http.ingress import Ingress
from sllm_vllm.router.http.openapi import openapi_document
from tests.support.cases import every_case
from tests.support.fake_gate import (
    CHAT,
    MODELS,
    Answer,
    EngineProcess,
    FakeGate,
    Served,
    chat,
    running_engine,
    serving,
    until,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine() as process:
        yield process


@pytest.fixture
def gate(engine: EngineProcess) -> FakeGate:
    return FakeGate([("a", engine.url)])


# ------------------------------------------------------------------------------------------------- its own routes


async def test_models_are_listed_in_the_gates_order(gate: FakeGate) -> None:
    async with serving(gate) as served:
        listed = (await served.get("/v1/models")).json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == list(MODELS)
    assert listed["data"][0] == {
        "id": "meta/tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "sllm-vllm",
        "root": "hf:meta/tiny",
        "max_model_len": None,
    }


@pytest.mark.parametrize(("shows", "root"), [(False, "other"), (True, "/srv/secret/other")])
async def test_models_show_their_length_and_paths_of_the_server_only_if_asked(
    gate: FakeGate, shows: bool, root: str
) -> None:
    gate.root, gate.max_model_len = "/srv/secret/", 4096
    async with serving(gate, IngressSettings(show_paths=shows, drain_s=1)) as served:
        one = (await served.get("/v1/models/other")).json
        listed = (await served.get("/v1/models")).json["data"][1]
    assert one == listed
    assert (one["root"], one["max_model_len"]) == (root, 4096)


# ------------------------------------------------------------------------------------------------ the form of errors


async def test_errors_below_v1_messages_have_anthropics_form(gate: FakeGate) -> None:
    settings = IngressSettings(body_bytes=1024, drain_s=1)
    async with serving(gate, settings) as served:
        found = [
            await served.post(b"[]", "/v1/messages"),
            await served.post(chat("nobody"), "/v1/messages?beta=true"),
            await served.post(chat() | {"x": "x" * 2000}, "/v1/messages/count_tokens"),
            await served.get("/v1/messages"),
        ]
        gate.rejects = Rejected(429, "rate_limit_error", "full", code="queue_full")
        found.append(await served.post(chat(), "/v1/messages"))
        gate.rejects = Rejected(503, "server_error", "none")
        found.append(await served.post(chat(), "/v1/messages"))
    kinds = ["invalid_request_error", "not_found_error", "request_too_large", "invalid_request_error"]
    kinds += ["rate_limit_error", "overloaded_error"]
    for answer, kind in zip(found, kinds, strict=True):
        assert answer.json.keys() == {"type", "error"}
        assert answer.json["type"] == "error"
        assert answer.json["error"].keys() == {"type", "message"}
        assert answer.json["error"]["type"] == kind


async def test_broken_stream_of_messages_ends_with_anthropics_error(gate: FakeGate) -> None:
    async with serving(gate) as served:
        answer = await served.post(chat(stream=True, breaks_after=2), "/v1/messages")
    last = answer.text.rstrip("\n").split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    event = json.loads(last.partition("data: ")[2])
    assert (event["type"], event["error"]["type"]) == ("error", "api_error")


@pytest.mark.parametrize(("path", "key"), [("/v1/embeddings", "code"), ("/v1/messages", "type")])
async def test_route_that_the_engine_lacks_is_told_in_the_clients_form(gate: FakeGate, path: str, key: str) -> None:
    body = chat(bare='{"detail":"Not Found"}', status=404)
    async with serving(gate) as served:
        answer = await served.post(body, path)
        own = await served.post(chat(status=404), path)
    assert answer.status == 404
    assert path in answer.json["error"]["message"]
    assert answer.json["error"][key] == {"code": "route_not_served", "type": "not_found_error"}[key]
    assert own.json["error"]["message"] == "no"  # the engine's own errors pass
    assert [outcome.how for outcome in gate.outcomes] == ["done", "done"]


@pytest.mark.parametrize("path", ["/v1/models/meta/tiny", "/v1/models/meta%2Ftiny"])
async def test_one_model_is_shown(gate: FakeGate, path: str) -> None:
    async with serving(gate) as served:
        assert (await served.get(path)).json["id"] == "meta/tiny"


async def test_model_that_is_not_served_is_404_and_the_known_are_named(gate: FakeGate) -> None:
    gate.models = [f"model-{number}" for number in range(30)]
    async with serving(gate) as served:
        answers = [await served.post(chat("nobody")), await served.get("/v1/models/nobody")]
    for answer in answers:
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found"
        assert "`nobody`" in answer.error["message"]
        assert "model-19 and 10 more" in answer.error["message"]
    assert gate.facts == []


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
async def test_ready_says_what_the_gate_says(gate: FakeGate, is_ready: bool, status: int) -> None:
    gate.is_ready_now = is_ready
    async with serving(gate) as served:
        assert (await served.get("/ready")).status == status
        assert (await served.get("/health")).status == 200


async def test_head_is_get_without_a_body(gate: FakeGate) -> None:
    async with serving(gate) as served:
        answer, full = await served.ask("HEAD", "/v1/models"), await served.get("/v1/models")
    assert (answer.status, answer.text) == (200, "")
    assert answer.headers["content-length"] == str(len(full.text))


@every_case(
    "method, path, allowed",
    [
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/other", "GET, HEAD"),
        ("GET", CHAT, "POST"),
        ("PUT", "/score", "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
    ],
)
async def test_wrong_method_names_the_right_ones(gate: FakeGate, method: str, path: str, allowed: str) -> None:
    async with serving(gate) as served:
        answer = await served.ask(method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)


async def test_document_names_every_path_it_describes_and_they_answer(gate: FakeGate) -> None:
    async with serving(gate) as served:
        document = (await served.get("/openapi.json")).json
        for path, item in document["paths"].items():
            method = "POST" if "post" in item else "GET"
            answer = await served.ask(method, path.replace("{model}", "other"), body={"model": "other"})
            assert (path, answer.status) == (path, 200)
    assert document == json.loads(json.dumps(openapi_document()))


async def test_answer_says_nothing_of_the_server(gate: FakeGate) -> None:
    async with serving(gate) as served:
        for answer in (await served.get("/health"), await served.post(chat())):
            assert "server" not in answer.headers
            assert len(answer.headers.getall("date")) == 1


# ---------------------------------------------------------------------------------------------- errors and limits


@pytest.mark.parametrize(
    ("rejected", "status", "retry_after"),
    [
        (Rejected(429, "rate_limit_error", "full", retry_after_s=0.2, code="queue_full"), 429, "1"),
        (Rejected(503, "server_error", "none", retry_after_s=7.1), 503, "8"),
        (Rejected(503, "server_error", "none"), 503, "1"),
        (Rejected(504, "timeout_error", "late"), 504, None),
        (Rejected(404, "invalid_request_error", "gone"), 404, None),
    ],
)
async def test_gates_refusal_is_told(gate: FakeGate, rejected: Rejected, status: int, retry_after: str | None) -> None:
    gate.rejects = rejected
    async with serving(gate) as served:
        answer = await served.post(chat())
    assert (answer.status, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.error["message"] == rejected.message
    assert answer.error["type"] == rejected.kind
    assert answer.error["code"] == rejected.code


@every_case("body", [b"", b"[]", b"{", b'{"model": 1}', b"[" * 100_000, b'{"model": "\xff"}'])
async def test_body_that_can_not_be_read_is_400(gate: FakeGate, body: bytes) -> None:
    async with serving(gate) as served:
        answer = await served.post(body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


@every_case("times", [1.5, 40])
@every_case("is_chunked", [False, True])
async def test_body_that_is_too_large_is_413(gate: FakeGate, times: float, is_chunked: bool) -> None:
    pad = b" " * int(1024 * times)
    pieces = [b"%x\r\n%b\r\n" % (len(pad), pad), b"0\r\n\r\n"] if is_chunked else [pad]
    head = b"transfer-encoding: chunked" if is_chunked else b"content-length: %d" % len(pad)
    async with serving(gate, IngressSettings(body_bytes=1024, drain_s=1)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n" + b"".join(pieces))
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"413"
        writer.close()
    assert gate.facts == []


async def test_largest_body_passes(gate: FakeGate) -> None:
    body = json.dumps(chat()).encode()
    async with serving(gate, IngressSettings(body_bytes=1 << 20, drain_s=1)) as served:
        whole = await served.post(body + b" " * ((1 << 20) - len(body)))
        more = await served.post(body + b" " * ((1 << 20) - len(body) + 1))
    assert (whole.status, more.status) == (200, 413)


async def test_all_bodies_together_have_a_limit(gate: FakeGate) -> None:
    gate.released.clear()
    body = json.dumps(chat()).encode() + b" " * 700
    async with serving(gate, IngressSettings(bodies_bytes=1500, drain_s=1)) as served:
        first = asyncio.create_task(served.post(body))
        await until(lambda: gate.num_waiting, "the first to wait")
        refused = await served.post(body)
        gate.released.set()
        assert (await first).status == 200
        assert (await served.post(body)).status == 200
    assert (refused.status, refused.error["code"]) == (503, "overloaded")


async def test_requests_at_once_have_a_limit(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate, IngressSettings(requests_max=1, drain_s=1)) as served:
        first = asyncio.create_task(served.post(chat()))
        await until(lambda: gate.num_waiting, "the first to wait")
        refused = await served.post(chat())
        assert (await served.get("/health")).status == 200
        gate.released.set()
        assert (await first).status == 200
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")


async def test_compressed_body_is_refused(gate: FakeGate) -> None:
    async with serving(gate) as served:
        answer = await served.post(b"x", headers={"content-encoding": "gzip"})
    assert answer.status == 415


async def test_form_with_a_model_passes(gate: FakeGate) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    async with serving(gate) as served:
        answer = await served.post(body, "/v1/audio/transcriptions", headers=kind)
        elsewhere = await served.post(body, headers=kind)
    assert answer.json["echo"]["body"].encode() == body
    assert elsewhere.status == 415


async def test_bug_in_the_gate_is_500_in_the_right_form_and_stands_in_the_log(
    gate: FakeGate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.rejects = ZeroDivisionError("a bug")  # type: ignore[assignment]
    async with serving(gate) as served:
        answer = await served.post(chat())
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "ZeroDivisionError: a bug" in caplog.text
    assert "a bug" not in answer.text


# ----------------------------------------------------------------------------------------------------- CORS, log


async def test_pages_read_nothing_by_itself(gate: FakeGate) -> None:
    async with serving(gate) as served:
        answers = [await served.get("/v1/models", origin="http://page"), await served.post(chat())]
    assert ["access-control-allow-origin" in answer.headers for answer in answers] == [False, False]


async def test_listed_pages_may_read(gate: FakeGate) -> None:
    settings = IngressSettings(cors_origins=("http://page",), drain_s=1)
    async with serving(gate, settings) as served:
        sent = {"origin": "http://page", "access-control-request-headers": "authorization"}
        asked = await served.ask("OPTIONS", CHAT, headers=sent)
        answers: list[Answer] = [await served.post(chat(), headers=sent), await served.post(b"", headers=sent)]
        other = await served.post(chat(), headers={"origin": "http://other"})
    assert (asked.status, asked.headers["access-control-allow-headers"]) == (204, "authorization")
    assert [answer.headers.getall("access-control-allow-origin") for answer in (asked, *answers)] == [
        [sent["origin"]]
    ] * 3
    assert "access-control-allow-origin" not in other.headers


async def test_one_line_for_each_request(gate: FakeGate, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sllm_vllm.router")
    async with serving(gate) as served:
        await served.post(chat(), headers={"x-request-id": "mine"})
        await served.get("/nowhere%0Aforged")
    first, second = [record.getMessage() for record in caplog.records if record.name == "sllm_vllm.router.http.ingress"]
    pattern = (
        r"request id=mine-\w{8} path='/v1/chat/completions' model='meta/tiny' status=200 outcome=done "
        r"ttfb_ms=[\d.]+ seconds=[\d.]+ replica=a attempts=1"
    )
    assert re.fullmatch(pattern, first)
    assert "status=404 outcome=local ttfb_ms=- " in second
    assert "\n" not in second


# -------------------------------------------------------------------------------------------------- real clients


async def test_openai_client_plain(gate: FakeGate) -> None:
    async with serving(gate) as served, client_of(served) as client:
        models = [model.id async for model in client.models.list()]
        answer = await client.chat.completions.create(model=MODELS[0], messages=[{"role": "user", "content": "hi"}])
    assert models == list(MODELS)
    assert answer.choices[0].message.content == " said a"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


async def test_openai_client_stream(gate: FakeGate) -> None:
    async with serving(gate) as served, client_of(served) as client:
        stream = await client.chat.completions.create(
            model=MODELS[0], messages=[{"role": "user", "content": "hi"}], stream=True, user="u"
        )
        got = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
    assert got == ["u/0 ", "u/1 ", "u/2 "]


async def test_openai_client_sees_the_error_in_a_stream(gate: FakeGate) -> None:
    async with serving(gate) as served, client_of(served) as client:
        stream = await client.chat.completions.create(
            model=MODELS[0], messages=[], stream=True, extra_body={"fake": {"breaks_after": 1}}
        )
        with pytest.raises(openai.APIError, match="The engine failed"):
            async for _ in stream:
                pass


async def test_openai_client_knows_the_errors(gate: FakeGate) -> None:
    async with serving(gate) as served, client_of(served) as client:
        with pytest.raises(openai.NotFoundError, match="meta/tiny, other"):
            await client.completions.create(model="nobody", prompt="x")
        gate.rejects = Rejected(429, "rate_limit_error", "come again", retry_after_s=3)
        with pytest.raises(openai.RateLimitError, match="come again"):
            await client.completions.create(model=MODELS[0], prompt="x")


def client_of(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


# ------------------------------------------------------------------------------------------------- beginning and end


async def test_what_is_not_http_for_asgi_is_left_alone(gate: FakeGate) -> None:
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "lifespan.startup"}

    await Ingress(gate, IngressSettings())({"type": "lifespan"}, receive, send)
    assert sent == []


async def test_request_under_way_ends_before_the_server_does(gate: FakeGate) -> None:
    gate.released.clear()
    async with serving(gate, IngressSettings(drain_s=60)) as served:
        asking = asyncio.create_task(served.post(chat()))
        await until(lambda: gate.num_waiting, "the request")
        releasing = asyncio.create_task(release_when_closed(served))
    await releasing
    assert (await asking).status == 200


async def release_when_closed(served: Served) -> None:
    def is_closed() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", served.port)) != 0

    await until(is_closed, "the server to take no more")
    served.gate.released.set()


async def test_request_that_does_not_end_is_ended_with_the_server(gate: FakeGate) -> None:
    async with serving(gate, IngressSettings(drain_s=0)) as served:
        asking = asyncio.create_task(served.post(chat(stream=True, stalls_after=1)))
        await until(lambda: gate.num_first_bytes, "the first byte")
    last = json.loads((await asking).text.rstrip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "stopping"
    assert [outcome.how for outcome in gate.outcomes] == ["client_left"]


# ------------------------------------------------------------------------------------------------- what may be left out


@pytest.mark.parametrize("model", [{}, {"model": None}])
async def test_body_without_a_model_means_the_only_one(gate: FakeGate, model: dict[str, None]) -> None:
    body = {key: value for key, value in chat().items() if key != "model"} | model
    gate.models = ["only"]
    async with serving(gate) as served:
        answer = await served.post(body)
        assert answer.status == 200
        assert json.loads(answer.json["echo"]["body"]) == body
        gate.models = ["one", "two"]
        refused = await served.post(body)
    assert [facts.model for facts in gate.facts] == ["only"]
    assert (refused.status, refused.error["param"]) == (400, "model")


async def test_form_without_a_model_means_the_only_one(gate: FakeGate) -> None:
    gate.models = ["only"]
    form = b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nRIFF\r\n--B--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=B"}
    async with serving(gate) as served:
        assert (await served.post(form, "/v1/audio/transcriptions", headers=headers)).status == 200
    assert [facts.model for facts in gate.facts] == ["only"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
async def test_json_without_its_header_is_415_and_names_the_header(gate: FakeGate, kind: str) -> None:
    async with serving(gate) as served:
        answer = await served.post(chat(), headers={"content-type": kind})
    assert answer.status == 415
    assert "Content-Type: application/json" in answer.error["message"]


async def test_models_are_shown_to_a_key_in_x_api_key(gate: FakeGate) -> None:
    settings = IngressSettings(key_digests=(digest_of("the key"),), drain_s=1)
    async with serving(gate, settings) as served:
        for path in ("/v1/models", "/v1/models/other"):
            assert (await served.get(path, **{"x-api-key": "the key"})).status == 200
            assert (await served.get(path, **{"x-api-key": "wrong"})).status == 401


# ---------------------------------------------------------------------------------------------------- large bodies


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_large_body_reaches_the_engine_as_it_is(gate: FakeGate, is_chunked: bool) -> None:
    body = json.dumps(chat() | {"x": "grüße \\ " * 300_000}, ensure_ascii=False).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 100_000):
            yield body[at : at + 100_000]

    async with serving(gate) as served:
        for _ in range(3):
            answer = await served.post(pieces() if is_chunked else body)
            assert answer.status == 200
            assert answer.json["echo"]["body"].encode("latin-1") == body
