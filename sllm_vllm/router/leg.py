"""The answer to one request as the client is to get it, whichever engine it comes from now. Data path; one a ticket.

A leg reads from one engine until a ``Mover`` diverts it; then the target's answer goes on where the client is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from sllm_vllm.router.body import Body
from sllm_vllm.router.gate import Gate, MoveOrder, MoveReport, Ticket
from sllm_vllm.router.headers import Headers, value_of
from sllm_vllm.router.transcript import Continuation, NotAligned, Transcript, split_events
from sllm_vllm.router.upstream import Diverted, EngineConnection, EngineFailed, Upstream

MOVABLE_TARGETS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Asked:
    """What an engine is asked: path and query, the client's headers, the body, and the request's X-Request-Id."""

    target: str
    headers: Headers
    body: Body
    shown: str

    @property
    def is_movable(self) -> bool:
        """Whether its kind of answer can go on elsewhere."""
        return self.target.partition("?")[0] in MOVABLE_TARGETS


class Leg:
    """One ticket's answer. ``close`` ends it, and whatever move is under way.

    Args:
        is_moving: whether orders to move are to be followed at all.
    """

    def __init__(self, ticket: Ticket, asked: Asked, gate: Gate, *, is_moving: bool) -> None:
        self.ticket = ticket
        self.asked = asked
        self.engine: EngineConnection | None = None
        self._gate = gate
        self._is_moving = is_moving and asked.is_movable
        self._transcript: Transcript | None = None
        self._continuation: Continuation | None = None
        self._rest = b""
        self._next: asyncio.Task[EngineConnection] | None = None
        """The target's answer, once the source's is diverted."""
        self._held_at_s = 0.0
        self._has_given = asyncio.Event()
        self._mover: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------------------------- the answer

    async def open(self, upstream: Upstream, headers: Headers) -> None:
        """Send the request and wait for the head of the answer.

        Raises:
            EngineFailed: there is none.
        """
        try:
            engine = await upstream.post(
                self.ticket.url,
                target=self.asked.target,
                headers=headers,
                body=self.asked.body,
                on_sent=self._sent,
            )
        except Diverted:
            engine = await self._diverted()
        self.engine = engine
        if self._is_moving and is_event_stream(engine.headers):
            self._transcript = Transcript()

    async def read(self) -> bytes:
        """What there is for the client, at least a byte; empty at the end. Of a stream that can move whole events.

        Raises:
            EngineFailed: it ended too early.
        """
        while True:
            assert self.engine is not None
            try:
                data = await self.engine.read()
            except Diverted:
                self.engine = await self._diverted()
                self._rest = b""
                if self._transcript is not None:
                    self._continuation = Continuation(self._transcript)
                continue
            if self._transcript is None:
                return data
            if not data:
                rest, self._rest = self._rest, b""
                return rest
            if events := self._whole_events(data):
                self._transcript.note(events)
                self._has_given.set()
                return events

    @property
    def is_moving(self) -> bool:
        """Whether it may go on elsewhere, as far as is known here."""
        return self._is_moving

    @property
    def head(self) -> EngineConnection:
        """The engine whose answer begins, for its status and headers."""
        assert self.engine is not None
        return self.engine

    @property
    def is_at_end(self) -> bool:
        """Whether the whole answer was read."""
        return self.engine is not None and self.engine.is_at_end and not self._rest

    def close(self) -> None:
        """End what is left of it, here and at a target. Waits for nothing: a request's task may be being cancelled."""
        if self._mover is not None:
            self._mover.cancel()
        if self._next is not None:
            drop_answer(self._next)
        if self.engine is not None:
            self.engine.close()

    def _sent(self, engine: EngineConnection) -> None:
        self.engine = engine

    def _whole_events(self, data: bytes) -> bytes:
        if self._continuation is None:
            events, self._rest = split_events(self._rest + data)
            return events
        try:
            return self._continuation.feed(data)
        except NotAligned as problem:
            raise EngineFailed(f"the engine that it was moved to does not go on: {problem}") from None

    async def _diverted(self) -> EngineConnection:
        assert self._next is not None
        if self.engine is not None:
            self.engine.abort()
        engine = await self._next
        self._next = None
        return engine

    # ---------------------------------------------------------------------------------------------- what moves it

    def follow(self, start: Callable[[Leg, MoveOrder], asyncio.Task[None]]) -> None:
        """Take orders to move; ``start`` begins to carry one out."""

        def on_order(order: MoveOrder) -> None:
            problem = self._why_not(order)
            if problem:
                is_lasting = not self._is_moving
                self._gate.not_moved(self.ticket, order, MoveReport(), reason=problem, is_lasting=is_lasting)
            else:
                self._mover = start(self, order)

        self._gate.follow(self.ticket, on_order)

    async def wait_given(self, seconds_max: float) -> None:
        """Until the client of a stream gets its next events: what is held from then on, it misses latest."""
        if self._transcript is None:
            return
        self._has_given.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                await self._has_given.wait()

    def hold(self) -> bool:
        """Give the client nothing more until ``release`` or ``divert``; False if there is nothing to be held."""
        self._held_at_s = time.monotonic()
        return self.engine is not None and self.engine.hold()

    def release(self) -> None:
        """Go on with the engine's own answer."""
        if self.engine is not None:
            self.engine.release()

    def divert(self, order: MoveOrder, answer: asyncio.Task[EngineConnection]) -> bool:
        """The client gets the target's answer from where it is; False if the whole of the source's has come."""
        if self.engine is None or not self.engine.divert():
            return False
        self.ticket = order.target
        self._next = answer
        return True

    def check_aligned(self, events: bytes) -> None:
        """Assert that a whole answer of a target goes on from where the client is.

        Raises:
            NotAligned: it is an error.
        """
        if self._transcript is not None:
            Continuation(self._transcript).feed(events)

    @property
    def held_s(self) -> float:
        """Since ``hold``."""
        return time.monotonic() - self._held_at_s

    def _why_not(self, order: MoveOrder) -> str:
        if not self._is_moving:
            return f"an answer of {self.asked.target.partition('?')[0]} is not moved"
        if order.source != self.ticket.replica:
            return f"it is on {self.ticket.replica}, not on {order.source}"
        if self._mover is not None and not self._mover.done():
            return "it is moving already"
        return ""


def is_event_stream(headers: Headers) -> bool:
    """Whether an engine's answer is a stream of events that can be read as it is."""
    is_open = not value_of(headers, b"content-encoding") and not value_of(headers, b"content-length")
    return is_open and value_of(headers, b"content-type").strip().lower().startswith(b"text/event-stream")


def drop_answer(answer: asyncio.Task[EngineConnection]) -> None:
    """Whatever becomes of it, nobody wants it."""
    answer.cancel()  # an answer whose head has not come is aborted by that
    answer.add_done_callback(_abort)


def _abort(answer: asyncio.Task[EngineConnection]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        answer.result().abort()
