"""A request on one of two engines in the test's process, whose client reads, and an ingress between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp

from sllm_vllm.router.config.settings import IngressSettings, MigrationSection
from tests.router.migration.moving_engine import MovingEngine, moving_engines, text_of
from tests.support.fake_gate import MODELS, FakeGate, Served, serving, until
from tests.support.waiting import DEADLINE_S

NUM_TOKENS = 40
DONE = "[DONE]"


@dataclass
class Client:
    """One that reads in the background."""

    status: int = 0
    events: list[Any] = field(default_factory=list)
    body: Any = None
    comments: list[bytes] = field(default_factory=list)
    is_cut: bool = False
    has_ended: bool = False

    @property
    def text(self) -> str:
        return "".join(event["choices"][0]["text"] for event in self.events if event != DONE and "choices" in event)

    @property
    def num_tokens(self) -> int:
        return len(self.text.split())


@dataclass
class Bench:
    """A request on engine a, whose client reads; b is where it may go."""

    gate: FakeGate
    a: MovingEngine
    b: MovingEngine
    client: Client
    reading: asyncio.Task[None]
    again: Callable[[Client], Coroutine[Any, Any, None]]
    """The same request once more."""

    async def has(self, num_tokens: int) -> None:
        """Generate at the engine that has it, and wait for the client to have so many."""
        await until(lambda: self.client.num_tokens >= num_tokens, f"{num_tokens} tokens at the client")

    async def ended(self) -> Client:
        await asyncio.wait_for(self.reading, DEADLINE_S)
        return self.client

    async def refused(self) -> tuple[str, bool]:
        await until(lambda: self.gate.refusals, "the move to be refused")
        return self.gate.refusals[0]

    async def next_on_a_streams(self) -> None:
        """The connection that was held has no memory of it: the next stream there comes as it is generated."""
        self.gate.num_given, client = 0, Client()
        await self.a.allow(5)
        reading = asyncio.create_task(self.again(client))
        await until(lambda: client.num_tokens == 5, "the first tokens of the next stream")
        await self.a.allow(NUM_TOKENS)
        await asyncio.wait_for(reading, DEADLINE_S)
        assert_whole(client)

    async def moved(self) -> None:
        await until(lambda: self.gate.moves or self.gate.refusals, "the move")
        assert self.gate.refusals == []


@contextlib.asynccontextmanager
async def bench(*, stream: bool = True, path: str = "/v1/completions", **moves: Any) -> AsyncIterator[Bench]:
    async with moving_engines("a", "b") as (a, b):
        gate = FakeGate([("a", a.url), ("b", b.url)])
        settings = IngressSettings(drain_s=1, moves=MigrationSection(**moves))
        async with serving(gate, settings) as served:
            client = Client()
            body = {"model": MODELS[0], "prompt": "hello", "max_tokens": NUM_TOKENS, "stream": stream}
            reading = asyncio.create_task(read(served, path, body, client))
            try:
                await until(lambda: a.running, "the request at the engine")
                yield Bench(gate, a, b, client, reading, partial(read, served, path, body))
            finally:
                reading.cancel()
                await asyncio.wait({reading})


async def read(served: Served, path: str, body: dict[str, Any], client: Client) -> None:
    """As a client does: events as they come, or the body."""
    async with aiohttp.ClientSession() as session, session.post(served.url + path, json=body) as answer:
        client.status = answer.status
        try:
            if body["stream"]:
                async for line in answer.content:
                    if line.startswith(b":"):
                        client.comments.append(line)
                    if line.startswith(b"data: "):
                        data = line[6:].strip()
                        client.events.append(DONE if data == b"[DONE]" else json.loads(data))
            else:
                client.body = await answer.json()
        except aiohttp.ClientError:
            client.is_cut = True
    client.has_ended = True


def assert_whole(client: Client) -> None:
    """Nothing twice, no token missing, one end."""
    assert client.text == text_of(NUM_TOKENS)
    assert client.events[-1] == DONE
    assert client.events.count(DONE) == 1
    finishes = [one["choices"][0]["finish_reason"] for one in client.events[:-1]]
    assert [one for one in finishes if one] == ["length"]
