"""Keys: who gets in, and that neither side sees the other's key."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.keys import Keys, bearer_key, digest_of
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.http.serve import require_keys
from tests.support.cases import every_case
from tests.support.fake_gate import ENGINE_KEY, EngineProcess, FakeGate, chat, running_engine, serving

KEY = "sk-the-clients-key"
LOCKED = IngressSettings(key_digests=(digest_of("another"), digest_of(KEY)), drain_s=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine() as process:
        yield process


def bound(host: str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    listener = socket.socket(family)
    listener.bind((host, 0))
    return listener


def test_digest_is_what_sha256sum_prints() -> None:
    assert digest_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_each_key_opens_and_nothing_else() -> None:
    keys = Keys([digest_of("a"), digest_of("b")])
    assert [keys.allow(key) for key in (b"a", b"b", b"c", b"", b"a ")] == [True, True, False, False, False]


@every_case(
    "values, key",
    [
        ([b"Bearer abc"], b"abc"),
        ([b"bearer  abc "], b"abc"),
        ([b"Basic abc"], None),
        ([b"Bearer"], None),
        ([b"Bearer "], None),
        ([b"Bearer a", b"Bearer b"], None),
        ([], None),
    ],
)
def test_bearer_key(values: list[bytes], key: bytes | None) -> None:
    assert bearer_key(values) == key


@every_case("digest", ["abc", "A" * 64, "g" * 64])
def test_settings_take_digests_alone(digest: str) -> None:
    with pytest.raises(ValidationError, match="sha256sum"):
        IngressSettings(key_digests=(digest,))


def test_without_keys_only_this_machine_may_connect() -> None:
    with bound("127.0.0.1") as loopback, bound("0.0.0.0") as anyone:
        require_keys(IngressSettings(), [loopback])
        with pytest.raises(ConfigError, match="no keys"):
            require_keys(IngressSettings(), [loopback, anyone])
        require_keys(IngressSettings(insecure_no_keys=True), [anyone])
        require_keys(LOCKED, [anyone])
        assert anyone.getsockname()[0] == "0.0.0.0"


@every_case(
    "path, headers, status",
    [
        ("/v1/chat/completions", {"authorization": f"Bearer {KEY}"}, 200),
        ("/v1/chat/completions", {"authorization": f"bearer {KEY}"}, 200),
        ("/v1/chat/completions", {}, 401),
        ("/v1/chat/completions", {"authorization": f"Bearer {KEY}x"}, 401),
        ("/v1/chat/completions", {"authorization": KEY}, 401),
        ("/v1/chat/completions", {"authorization": f"Bearer {ENGINE_KEY}"}, 401),
        ("/v1/chat/completions", {"x-api-key": KEY}, 200),
        ("/v1/chat/completions", {"x-api-key": "wrong"}, 401),
        ("/v1/messages", {"x-api-key": KEY}, 200),
        ("/v1/messages", {"x-api-key": "wrong"}, 401),
        ("/v1/messages", {"authorization": f"Bearer {KEY}"}, 200),
    ],
)
async def test_key_is_needed(engine: EngineProcess, path: str, headers: dict[str, str], status: int) -> None:
    gate = FakeGate([("a", engine.url)])
    async with serving(gate, LOCKED) as served:
        answer = await served.post(chat(), path, headers=headers)
    assert answer.status == status
    assert len(gate.facts) == (status == 200)
    assert status == 200 or answer.json["error"]["type"] == "authentication_error"  # so in both dialects


async def test_lists_are_locked_too_and_health_is_not(engine: EngineProcess) -> None:
    paths = ("/v1/models", "/v1/models/other", "/nowhere", "/health", "/ready", "/openapi.json")
    async with serving(FakeGate([("a", engine.url)]), LOCKED) as served:
        statuses = [(await served.get(path)).status for path in paths]
    assert statuses == [401, 401, 401, 200, 200, 200]


async def test_neither_side_sees_the_others_key(engine: EngineProcess) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-api-key": KEY, "cookie": f"key={KEY}", "x-sllm-secret": KEY}
    async with serving(FakeGate([("a", engine.url)]), LOCKED) as served:
        answer = await served.post(chat(), headers=headers)
    reached = answer.json["echo"]["headers"]
    assert ENGINE_KEY not in str(answer.headers)
    assert KEY not in str(reached)
    assert ["authorization", f"Bearer {ENGINE_KEY}"] in reached


async def test_engine_that_refuses_the_router_is_no_news_for_the_clients_key(engine: EngineProcess) -> None:
    """An engine's 401 is about the router's key; the client's is fine."""
    gate = FakeGate([("a", engine.url)])
    async with serving(gate) as served:
        answer = await served.post(chat(status=401))
    assert answer.status == 502
    assert (len(gate.retries), gate.outcomes) == (2, [])  # the gate was given both failures, and ended it


async def test_log_holds_no_key(engine: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="sllm_vllm")
    async with serving(FakeGate([("a", engine.url)]), LOCKED) as served:
        answer = await served.post(chat(), headers={"authorization": f"Bearer {KEY}"})
    assert answer.status == 200
    assert "status=200" in caplog.text
    assert KEY not in caplog.text
    assert ENGINE_KEY not in caplog.text
