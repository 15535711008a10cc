"""Every route of vLLM's own API server, built by vLLM itself with the arguments that the node agent gives it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from sllm_vllm.engine.guard import EngineGuard
from sllm_vllm.node.core.launch import GUARD
from tests.support.cases import every_case
from tests.support.waiting import DEADLINE_S

KEY = "the-engines-key"
KEYLESS = "/health"
Answer = tuple[str, int]
"""The type of what is sent first, and its status or close code."""


def build(*arguments: str, tasks: tuple[str, ...] = ("generate",)) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:  # seen in 0.30, not in 0.27.1
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser())
    return build_app(parser.parse_args(["--model", "m", *GUARD, *arguments]), tasks)


@pytest.fixture(scope="module")
def app() -> Any:
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # only once a process, and other tests of this one need ours
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # its routes, too
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        patch.setenv("VLLM_PLUGINS", "")  # as an operator might, so that no endpoint plugin is loaded
        yield build("--allowed-origins", '["http://here"]')


async def ask(app: Any, path: str, method: str = "GET", *, kind: str = "http", **headers: str) -> Answer:
    """What the app answers first; 0 where it went through to an engine that is not there."""
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope: dict[str, Any] = {
        "type": kind,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": given,
    }
    scope |= {"method": method, "http_version": "1.1", "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}
    scope |= {"server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2), "subprotocols": []}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect" if kind == "websocket" else "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        async with asyncio.timeout(DEADLINE_S):
            await app(scope, receive, send)
    except Exception:  # whatever a route does without an engine: it was reached
        return "reached", 0
    first: Any = sent[0] if sent else {"type": "nothing"}
    return str(first["type"]), int(first.get("status", first.get("code", 0)))


def routes_of(app: Any) -> list[tuple[str, str]]:
    found = []
    for route in app.routes:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found += [(path, method) for method in sorted(getattr(route, "methods", None) or {"GET"})]
    return found


async def test_no_route_of_vllms_is_answered_without_the_key_but_health(app: Any) -> None:
    routes = routes_of(app)
    known = {path for path, _ in routes}
    assert {"/invocations", "/tokenize", "/metrics", "/load", "/docs", "/openapi.json", "/ping"} <= known
    assert {"/v1/completions", "/scale_elastic_ep", "/version", "/reset_prefix_cache", "/sleep"} <= known
    others = [(path, "GET") for path in ("/nothing", "/health/", "//health", "/health/../load")]
    for path, method in [*routes, *others]:
        if path == KEYLESS and method in {"GET", "HEAD"}:
            continue
        assert await ask(app, path, method) == ("http.response.start", 401), (method, path)
        assert await ask(app, path, kind="websocket") == ("websocket.close", 1008), path


@every_case("authorization", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY} "])
async def test_a_wrong_key_is_as_none(app: Any, authorization: str) -> None:
    for path in ("/version", "/metrics", "/v1/models"):
        assert await ask(app, path, authorization=authorization) == ("http.response.start", 401)


async def test_with_the_key_every_route_is_reached(app: Any) -> None:
    for scheme in ("Bearer", "bearer"):
        assert await ask(app, "/version", authorization=f"{scheme} {KEY}") == ("http.response.start", 200)
        assert await ask(app, "/docs", authorization=f"{scheme} {KEY}") == ("http.response.start", 200)
    assert await ask(app, "/tokenize", "POST", authorization=f"Bearer {KEY}") != ("http.response.start", 401)


async def test_health_and_a_browsers_preflight_need_no_key(app: Any) -> None:
    assert (await ask(app, KEYLESS))[1] != 401
    preflight = {"origin": "http://here", "access_control_request_method": "POST"}
    assert await ask(app, "/v1/completions", "OPTIONS", **preflight) == ("http.response.start", 200)
    assert await ask(app, "/v1/completions", "OPTIONS") == ("http.response.start", 401)


async def test_an_embedding_model_is_guarded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    pooling = build(tasks=("embed",))
    assert await ask(pooling, "/tokenize", "POST") == ("http.response.start", 401)
    assert await ask(pooling, "/metrics") == ("http.response.start", 401)


async def test_keys_of_the_arguments_overrule_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    own = build("--api-key", "first", "second")
    found = [(await ask(own, "/version", authorization=f"Bearer {key}"))[1] for key in ("first", "second", KEY)]
    assert found == [200, 200, 401]


async def test_without_any_key_all_but_health_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    open_app = build()
    assert await ask(open_app, "/version") == ("http.response.start", 401)
    assert await ask(open_app, "/version", authorization="Bearer ") == ("http.response.start", 401)


async def test_two_keys_in_one_request_are_none() -> None:
    guard = EngineGuard(lambda *_: pytest.fail("let in"))
    guard._digests = ()
    sent: list[Any] = []
    both = [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")]

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({"type": "http", "method": "GET", "path": "/", "headers": both}, lambda: pytest.fail("read"), send)
    assert sent[0]["status"] == 401
