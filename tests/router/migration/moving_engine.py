"""An engine in the test's own process whose requests can be moved, with real sockets; a test says how far it goes.

Token ``k`` of any answer is the number ``k``, its text ``t<k> ``: what an answer should be is known, wherever it was
made. Nothing is generated before ``allow`` says so; every answer ends after ``max_tokens``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from sllm_vllm.engine.resume import check_signature
from tests.support.fake_gate import ENGINE_KEY

KEY = "sllm_resume"
CREATED = {"a": 1_764_000_000, "b": 1_764_000_077, "c": 1_764_000_099}


def text_of(num_tokens: int) -> str:
    """What an answer of so many tokens says."""
    return "".join(f"t{number} " for number in range(num_tokens))


def owned_text(body: dict[str, Any]) -> str:
    """What a body says that its request owns, without the signature."""
    signed: str = body["vllm_xargs"][KEY]
    return signed.partition(":")[2]


@dataclass
class Running:
    """A request in flight."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


@dataclass
class MovingEngine:
    """One engine. Set what it should do wrong; read what it was asked."""

    name: str
    url: str = ""
    allowed: int = 0
    """Tokens that an answer may have by now, beside those it came with."""
    state: dict[str, Any] = field(default_factory=lambda: {"resume": True})
    immovable: str = ""
    fill_status: int = 200
    resumed_status: int = 200
    says_error: bool = False
    """A resumed stream begins, and then says what went wrong."""
    says_no_tokens: bool = False
    """It has no plugin of ours, or an old one."""
    is_deaf: bool = False
    """It passes over what a request owns, and begins anew."""
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    """What waits for an event: ``fill``, ``resumed``, ``tokens``."""
    running: dict[str, Running] = field(default_factory=dict)
    fills: list[int] = field(default_factory=list)
    """Tokens of each prefill that was asked for."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_aborted: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    connections: set[asyncio.Transport] = field(default_factory=set)
    is_dead: bool = False

    async def allow(self, num_tokens: int) -> None:
        """Generate up to so many tokens of each answer."""
        async with self.changed:
            self.allowed = num_tokens
            self.changed.notify_all()

    def die(self) -> None:
        """Break every connection, as a process that is killed does, and take no other."""
        self.is_dead = True
        for connection in list(self.connections):
            connection.abort()

    @property
    def num_tokens(self) -> int:
        """Of the only answer in flight."""
        return len(next(iter(self.running.values())).tokens) if self.running else -1

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == f"Bearer {ENGINE_KEY}"
        assert request.transport is not None
        if self.is_dead:
            request.transport.abort()
        self.connections.add(request.transport)
        if request.path == "/sllm/state":
            told = {"block_size": 4, "max_model_len": 1000, "resume_key": KEY, **self.state}
            return web.json_response(told)
        if request.path == "/sllm/requests":
            shown = [{"id": id_, "num_output_tokens": [len(one.tokens)]} for id_, one in self.running.items()]
            return web.json_response({"requests": shown})
        if request.path.startswith("/sllm/requests/"):
            return await self.tokens(request.path.split("/")[3])
        body = await request.json()
        self.bodies.append(body)
        if body["max_tokens"] == 1:
            await self.passed("fill")
            self.fills.append(len(body["prompt"]))
            return web.json_response({"choices": []}, status=self.fill_status)
        return await self.answer(request, body)

    async def passed(self, what: str) -> None:
        if what in self.gates:
            await self.gates[what].wait()

    async def tokens(self, id_: str) -> web.Response:
        await self.passed("tokens")
        one = self.running.get(id_)
        if one is None:
            return web.json_response({"error": "there is none"}, status=404)
        told: dict[str, Any] = {"prompt_token_ids": one.prompt, "immovable": self.immovable}
        if not self.immovable:
            choice = {"token_ids": one.tokens, "logprobs": None, "finish_reason": None, "stop_reason": None}
            told["resume"] = {
                "version": 1,
                "prompt_digest": "p",
                "num_cached_tokens": 0,
                "step": 1,
                "choices": [choice],
            }
        return web.json_response(told)

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        resume = self.resume_of(body, request)
        owned = resume["choices"][0]["token_ids"] if resume else []
        if resume:
            await self.passed("resumed")
            if self.resumed_status != 200:
                return web.json_response({"error": {"message": "queue full"}}, status=self.resumed_status)
        shown = request.headers["x-request-id"]
        self.running[shown] = one = Running(list(range(10)), list(owned))
        try:
            if body.get("stream"):
                return await self.stream(request, body, one)
            await self.generate(one, body["max_tokens"])
            return web.json_response(self.event(one.tokens, body, is_last=True))
        except (ConnectionError, asyncio.CancelledError):
            self.num_aborted += 1
            raise
        finally:
            del self.running[shown]

    def resume_of(self, body: dict[str, Any], request: web.Request) -> Any:
        """What a request owns, if it does, and its router signed that with this engine's key."""
        signed = (body.get("vllm_xargs") or {}).get(KEY)
        if signed is None or self.is_deaf:
            return None
        return json.loads(check_signature(signed, keys=[ENGINE_KEY], request=request.headers["x-request-id"]))

    def note(self, one: Running, num_sent: int, request: web.Request) -> bytes:
        """As an engine with our plugin says what a text comes from, to who asks."""
        if self.says_no_tokens or request.headers.get("x-sllm-notes") != "1":
            return b""
        said: list[Any] = [] if num_sent else [{"d": "p", "c": 0, "n": 1}]
        return b": sllm " + json.dumps([*said, {"i": 0, "t": one.tokens[num_sent:]}]).encode() + b"\n"

    async def stream(self, request: web.Request, body: dict[str, Any], one: Running) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if self.says_error:
            await response.write(b'data: {"error": {"message": "no blocks left"}}\n\ndata: [DONE]\n\n')
            return response
        num_sent = 0
        while True:
            if one.tokens[num_sent:]:
                is_last = len(one.tokens) == body["max_tokens"]
                event = self.event(one.tokens[num_sent:], body, is_last=is_last)
                note = self.note(one, num_sent, request)
                num_sent = len(one.tokens)
                await response.write(note + f"data: {json.dumps(event)}\n\n".encode())
            if num_sent == body["max_tokens"]:
                break
            await self.generate(one, len(one.tokens) + 1)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def generate(self, one: Running, num_tokens: int) -> None:
        async with self.changed:
            while len(one.tokens) < num_tokens:
                await self.changed.wait_for(lambda: len(one.tokens) < self.allowed)
                one.tokens.append(len(one.tokens) + 100 * self.is_deaf)

    def event(self, tokens: list[int], body: dict[str, Any], *, is_last: bool) -> dict[str, Any]:
        text = "".join(f"t{token} " for token in tokens)
        choice = {"index": 0, "text": text, "finish_reason": "length" if is_last else None}
        usage = {"prompt_tokens": 10, "completion_tokens": tokens[-1] + 1}
        return {
            "id": "cmpl-x",
            "created": CREATED[self.name],
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }


@contextlib.asynccontextmanager
async def moving_engines(*names: str) -> AsyncIterator[list[MovingEngine]]:
    """Engines that listen, on the caller's loop."""
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for name in names:
            engine = MovingEngine(name)
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", engine.handle)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert site._server is not None
            engine.url = "http://127.0.0.1:{1}".format(*site._server.sockets[0].getsockname())  # type: ignore[attr-defined]
            engines.append(engine)
        yield engines
