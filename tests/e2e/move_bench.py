"""Two real engines of one model, the real ingress before them, and a gate that moves a request when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.node.protocol import ReplicaReport
from sllm_vllm.router.config.settings import IngressSettings, MigrationSection
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, OnMove, Outcome, Rejected, ServedModel, Ticket
from sllm_vllm.router.http.ingress import Ingress
from sllm_vllm.router.http.serve import serve_app
from tests.e2e.real_agent import order, ready, warm_agent
from tests.e2e.resumed import Answer, Client
from tests.support.waiting import DEADLINE_S, wait_until

STEP_S = 0.01
"""Of an engine, at least: so that a switch comes soon after the token that it was ordered at."""
HELD_STEP_S = 0.5
"""Of an engine that a request is to leave, until it has: on a busy machine, too, it should not end before.

It begins with the token at which the move is ordered, and not with the order: the engine does not run ahead meanwhile.
"""
_SLOW = """
import os, time

def register():
    from vllm.v1.engine.core import EngineCore
    stock = EngineCore.step

    def is_held(core):
        try:
            with open(os.environ.get("SLOW_HELD", "")) as file:
                at_tokens = int(file.read() or 0)
        except OSError:
            return False
        return any(one.num_output_tokens >= at_tokens for one in core.scheduler.requests.values())

    def step(self):
        time.sleep(float(os.environ["SLOW_HELD_STEP_S" if is_held(self) else "SLOW_STEP_S"]))
        return stock(self)

    EngineCore.step = step
"""


def write_slow_plugin(directory: Path) -> Path:
    """A plugin of vLLM's that slows each step down; returns what belongs on PYTHONPATH."""
    information = directory / "slow_engine-1.0.dist-info"
    information.mkdir(parents=True)
    (directory / "slow_engine.py").write_text(_SLOW)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-engine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\nslow = slow_engine:register\n")
    return directory


@dataclass
class TwoEnginesGate:
    """A ``Gate``: all requests begin at the first engine; ``move`` has one go on at the other."""

    engines: Sequence[ReplicaReport]
    model: str
    tickets: dict[str, Ticket] = field(default_factory=dict)
    """By request."""
    followers: dict[str, OnMove] = field(default_factory=dict)
    moves: dict[str, list[MoveReport]] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    is_first: Callable[[str], int] = lambda _: 0
    """Which engine a request begins at."""
    holds: Sequence[Path] = ()
    """Files of the engines: while one is there, that engine is slow once a request has as many tokens as it says."""
    held: dict[str, int] = field(default_factory=dict)
    """Which engine a request is about to leave."""
    at_tokens: dict[str, int] = field(default_factory=dict)
    """By X-Request-Id: with how many tokens a request is to leave its first engine."""

    def served(self) -> Sequence[ServedModel]:
        return (ServedModel(self.model, 1, self.model),)

    async def acquire(self, facts: RequestFacts) -> Ticket:
        first = self.is_first(facts.id)
        ticket = self._ticket(facts.id, first)
        self.tickets[facts.id] = ticket
        for name, at_tokens in self.at_tokens.items():
            if facts.id.startswith(name):
                self._hold(facts.id, first, at_tokens)
        return ticket

    def first_byte(self, ticket: Ticket) -> None: ...

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        assert self.tickets.pop(ticket.request) == ticket
        self.followers.pop(ticket.request)
        self.outcomes.append(outcome)
        self._let_go(ticket.request)

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        raise Rejected(502, "server_error", failure.reason)

    def first_token(self, ticket: Ticket) -> None:
        del ticket

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        self.followers[ticket.request] = on_order

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        self.tickets[ticket.request] = order.target
        self.moves.setdefault(ticket.request, []).append(report)
        self._let_go(ticket.request)

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        self.refusals.setdefault(ticket.request, []).append(reason)
        self._let_go(ticket.request)

    def is_ready(self) -> bool:
        return True

    def move(self, name: str) -> None:
        """Have the request with this X-Request-Id go on at the other engine, if it has not ended."""
        for request, ticket in self.tickets.items():
            if request.startswith(name) and request in self.followers:
                here = [one.id for one in self.engines].index(ticket.replica)
                if request not in self.held:
                    self._hold(request, here, 0)
                self.followers[request](MoveOrder(ticket.replica, self._ticket(request, 1 - here)))

    def _hold(self, request: str, here: int, at_tokens: int) -> None:
        self.held[request] = here
        staging = self.holds[here].with_suffix(".new")
        staging.write_text(str(at_tokens))
        staging.replace(self.holds[here])

    def _let_go(self, request: str) -> None:
        here = self.held.pop(request, None)
        if here is not None and here not in self.held.values():
            self.holds[here].unlink(missing_ok=True)

    def of(self, told: dict[str, list[Any]], name: str) -> list[Any]:
        """What was told of the request with this X-Request-Id."""
        return [one for request, all_ in told.items() if request.startswith(name) for one in all_]

    def _ticket(self, request: str, number: int) -> Ticket:
        engine = self.engines[number]
        assert engine.url is not None
        return Ticket(request, engine.id, self.model, url=engine.url, api_key=engine.api_key or "", attempt=1)


@dataclass(frozen=True, slots=True)
class MoveBench:
    """``direct``: asks the first engine; ``routed``: asks through the ingress."""

    gate: TwoEnginesGate
    direct: Client
    routed: Client
    loop: asyncio.AbstractEventLoop

    async def whole(self, path: str, body: dict[str, Any]) -> Answer:
        """The answer as it is unmoved."""
        return await asyncio.to_thread(self.direct.ask, path, body)

    async def moved(self, path: str, body: dict[str, Any], at_tokens: Sequence[int]) -> tuple[Answer, str]:
        """The answer of a request that is ordered to move when its client, or engine, has so many tokens of its
        choice that has the most; and its name."""
        name = uuid.uuid4().hex
        named = replace(self.routed, headers={"X-Request-Id": name})
        if len(at_tokens) == 1:
            self.gate.at_tokens[name] = at_tokens[0]
        if body.get("stream"):
            return await asyncio.to_thread(self._stream, named, (path, body), name, at_tokens), name
        asking = asyncio.create_task(asyncio.to_thread(named.ask, path, body))
        for num in at_tokens:
            await asyncio.to_thread(wait_until, partial(self._has, name, num, asking), "tokens")
            self.gate.move(name)
        return await asking, name

    def _stream(self, client: Client, case: tuple[str, dict[str, Any]], name: str, at_tokens: Sequence[int]) -> Answer:
        answer, left = Answer(), sorted(at_tokens)
        for found in client.chunks(*case):
            answer.add(found)
            if left and max(map(len, answer.token_ids), default=0) >= left[0]:
                left.pop(0)
                self.loop.call_soon_threadsafe(self.gate.move, name)
        return answer

    def _has(self, name: str, num_tokens: int, asking: asyncio.Task[Answer]) -> bool:
        return asking.done() or self._num(name) >= num_tokens

    def _num(self, name: str) -> int:
        """Tokens that a request has at whichever engine it is, by what those say."""
        known = {name, f"chatcmpl-{name}", f"cmpl-{name}-0"}
        for engine in self.gate.engines:
            client = Client(engine.url or "", "", {"Authorization": f"Bearer {engine.api_key}"})
            for one in client.get("/sllm/requests")["requests"]:
                if one["id"] in known:
                    return int(max(one["num_output_tokens"]))
        return 0


@contextlib.asynccontextmanager
async def move_bench(
    directory: Path, model: Path, *arguments: str, step_s: float = STEP_S, is_first: Callable[[str], int] | None = None
) -> AsyncIterator[MoveBench]:
    """Both engines are ready, and have tried that they can hand over and take over requests."""
    slow = write_slow_plugin(directory / "plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(slow), os.environ.get("PYTHONPATH", "")])))
        patch.syspath_prepend(str(slow))  # the agent names all plugins that it finds
        patch.setenv("SLOW_STEP_S", str(step_s))
        patch.setenv("SLOW_HELD_STEP_S", str(max(step_s, HELD_STEP_S)))
        async with warm_agent(directory, migration=True) as agent:
            holds = [directory / f"held-{number}" for number in range(2)]
            engines = [
                await ready(agent, order(model, *arguments, environment={"SLOW_HELD": str(held)})) for held in holds
            ]
            for engine in engines:
                await asyncio.to_thread(wait_movable, engine)
            gate = TwoEnginesGate(engines, str(model), is_first=is_first or (lambda _: 0), holds=holds)
            async with _served(gate) as url:
                authorization = {"Authorization": f"Bearer {engines[0].api_key}"}
                direct = Client(engines[0].url or "", str(model), authorization)
                yield MoveBench(gate, direct, Client(url, str(model)), asyncio.get_running_loop())


def wait_movable(engine: ReplicaReport) -> None:
    client = Client(engine.url or "", "", {"Authorization": f"Bearer {engine.api_key}"})
    wait_until(lambda: client.get("/sllm/state")["resume"] is not None, "the trial")
    state = client.get("/sllm/state")
    assert state["resume"], state


@contextlib.asynccontextmanager
async def _served(gate: TwoEnginesGate) -> AsyncIterator[str]:
    settings = IngressSettings(drain_s=1, moves=MigrationSection())
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    started = asyncio.Event()
    running = asyncio.create_task(serve_app(Ingress(gate, settings), settings, sockets=[listener], started=started))
    try:
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        yield "http://127.0.0.1:{1}".format(*listener.getsockname())
    finally:
        running.cancel()
        await asyncio.wait({running})
