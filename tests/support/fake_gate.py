"""A Gate over a fixed list of engines, which notes what it is told, and the ingress over it, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, OnMove, Outcome, Rejected, ServedModel, Ticket
from sllm_vllm.router.http.client_state import ClientCounts
from sllm_vllm.router.http.ingress import Ingress
from sllm_vllm.router.http.serve import serve_app
from tests.support.waiting import DEADLINE_S

ENGINE_KEY = "the-engines-own-key"
MODELS = ("meta/tiny", "other")
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running ``stream_engine.py``."""

    name: str
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, Any]:
        """What it counted; blocks for a moment."""
        with urllib.request.urlopen(f"{self.url}/stats", timeout=DEADLINE_S) as answer:
            counted: dict[str, Any] = json.load(answer)
        return counted


@contextlib.contextmanager
def running_engine(name: str = "a") -> Iterator[EngineProcess]:
    """An engine that lives as long as the block."""
    command = [sys.executable, str(Path(__file__).with_name("stream_engine.py")), name, ENGINE_KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield EngineProcess(name, int(process.stdout.readline()), process)
        finally:
            process.kill()


@dataclass
class FakeGate:
    """Gives the engines in turn; a retry gets the next. ``is_held``: acquire waits until ``release``."""

    engines: Sequence[tuple[str, str]]
    """Names and URLs."""
    models: Sequence[str] = MODELS
    root: str = "hf:"
    max_model_len: int | None = None
    rejects: Rejected | None = None
    rejects_retry: Rejected | None = None
    attempts_max: int = 2
    is_ready_now: bool = True
    released: asyncio.Event = field(default_factory=asyncio.Event)
    facts: list[RequestFacts] = field(default_factory=list)
    tickets: dict[tuple[str, int], Ticket] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    num_first_bytes: int = 0
    num_first_tokens: int = 0
    num_waiting: int = 0
    num_given: int = 0
    followers: dict[str, OnMove] = field(default_factory=dict)
    """By request: who takes orders to move."""
    moves: list[MoveReport] = field(default_factory=list)
    refusals: list[tuple[str, bool]] = field(default_factory=list)
    """Why a request was not moved, and whether it never can be."""

    def __post_init__(self) -> None:
        self.released.set()

    def served(self) -> Sequence[ServedModel]:
        return [ServedModel(name, 1_700_000_000, f"{self.root}{name}", self.max_model_len) for name in self.models]

    async def acquire(self, facts: RequestFacts) -> Ticket:
        self.facts.append(facts)
        self.num_waiting += 1
        try:
            await self.released.wait()
        finally:
            self.num_waiting -= 1
        if self.rejects is not None:
            raise self.rejects
        return self._give(facts.id, facts.model, 1)

    def first_byte(self, ticket: Ticket) -> None:
        assert self.tickets[ticket.request, ticket.attempt] == ticket
        self.num_first_bytes += 1

    def first_token(self, ticket: Ticket) -> None:
        assert self.tickets[ticket.request, ticket.attempt] == ticket
        self.num_first_tokens += 1

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        assert self.tickets.pop((ticket.request, ticket.attempt)) == ticket
        self.followers.pop(ticket.request, None)
        self.outcomes.append(outcome)

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        assert self.tickets.pop((ticket.request, ticket.attempt)) == ticket
        self.failures.append(failure)
        self.retries.append(failure.reason)
        if self.rejects_retry is not None:
            raise self.rejects_retry
        if ticket.attempt >= self.attempts_max:
            raise Rejected(502, "server_error", f"Its engine failed: {failure.reason}", code="engine_failed")
        return self._give(ticket.request, ticket.model, ticket.attempt + 1)

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        assert self.tickets[ticket.request, ticket.attempt] == ticket
        self.followers[ticket.request] = on_order

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        assert self.tickets[ticket.request, ticket.attempt] == ticket
        self.tickets[ticket.request, ticket.attempt] = order.target
        self.moves.append(report)

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        assert self.tickets[ticket.request, ticket.attempt] == ticket
        self.refusals.append((reason, is_lasting))

    def order_move(self, target: str, *, source: str | None = None) -> None:
        """Have the only request go on at another engine."""
        ((request, on_order),) = self.followers.items()
        ((_, ticket),) = self.tickets.items()
        url = dict(self.engines)[target]
        on_order(MoveOrder(source or ticket.replica, replace(ticket, replica=target, url=url)))
        assert request == ticket.request

    def is_ready(self) -> bool:
        return self.is_ready_now

    def _give(self, request: str, model: str, attempt: int) -> Ticket:
        name, url = self.engines[self.num_given % len(self.engines)]
        self.num_given += 1
        ticket = Ticket(request, name, model, url=url, api_key=ENGINE_KEY, attempt=attempt)
        assert (request, attempt) not in self.tickets
        self.tickets[request, attempt] = ticket
        return ticket


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was read to its end. Names of headers are in any case."""

    status: int
    headers: CIMultiDictProxy[str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


@dataclass(frozen=True, slots=True)
class Served:
    """An ingress that listens."""

    port: int
    gate: FakeGate
    counts: ClientCounts = field(default_factory=ClientCounts)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self, method: str, path: str, *, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own. ``body``: what is not bytes or an iterator is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"content-type": "application/json", **(headers or {})}
        url = URL(self.url + path, encoded=True)
        async with aiohttp.ClientSession(auto_decompress=False) as client:
            answer = await client.request(method, url, data=data, headers=sent, allow_redirects=False)
            return Answer(answer.status, answer.headers, (await answer.read()).decode())

    async def get(self, path: str, **headers: str) -> Answer:
        """Ask without a body."""
        return await self.ask("GET", path, headers=headers)

    async def post(self, body: Any, path: str = CHAT, *, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask a model."""
        return await self.ask("POST", path, body=body, headers=headers)


@contextlib.asynccontextmanager
async def serving(gate: FakeGate, settings: IngressSettings | None = None) -> AsyncIterator[Served]:
    """The ingress over a gate, under uvicorn, on the caller's loop; every ticket has to be back at the end."""
    settings = settings or IngressSettings(drain_s=1)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    started = asyncio.Event()
    app = Ingress(gate, settings)
    counts = ClientCounts()
    running = asyncio.create_task(serve_app(app, settings, sockets=[listener], started=started, counts=counts))
    try:
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        yield Served(listener.getsockname()[1], gate, counts)
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert gate.tickets == {}
    assert gate.num_waiting == 0


async def until(is_so: Any, what: str) -> None:
    """As ``tests.support.waiting.wait_until``, without holding up the loop that the ingress runs on."""
    from tests.support.waiting import wait_until

    done = asyncio.get_running_loop().run_in_executor(None, wait_until, is_so, what)
    await done


def chat(model: str = MODELS[0], *, stream: bool = False, user: str = "me", **fake: Any) -> dict[str, Any]:
    """The body of a chat request, with what the engine shall do."""
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "stream": stream, "user": user, "fake": fake}
