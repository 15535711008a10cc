"""The answer to one request as the client is to get it, whichever engine it comes from now. Data path; one a ticket.

A leg reads from one engine until a ``Mover`` diverts it; then the target's answer goes on where the client is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sllm_vllm.engine.answer_notes import CORE_HEADER, DIED, NOTES_HEADER
from sllm_vllm.router.admission import is_small
from sllm_vllm.router.body import Body
from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.engine_api import read_reply
from sllm_vllm.router.gate import Failure, Gate, MoveOrder, MoveReport, Ticket
from sllm_vllm.router.headers import Headers, for_engine, value_of
from sllm_vllm.router.moved_body import MovedBody, NotMovable
from sllm_vllm.router.resumed_body import resumed_body
from sllm_vllm.router.token_log import TokenLog
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
        before: of the same request, whose engine failed after its client had a part of the answer: this one gives the
            rest.
    """

    def __init__(self, ticket: Ticket, asked: Asked, gate: Gate, *, is_moving: bool, before: Leg | None = None) -> None:
        self.ticket = ticket
        self.asked = asked
        self.engine: EngineConnection | None = None
        self._gate = gate
        self._is_moving = is_moving and asked.is_movable
        self._transcript: Transcript | None = None if before is None else before._transcript
        self._owned = None if before is None else before.resume()
        """What the answer had got at an engine that failed."""
        self._log = TokenLog()
        self._log_before: TokenLog | None = None if before is None else before.longest_log
        self._is_proven = False
        """Its engine has answered, in part."""
        self._continuation: Continuation | None = None
        self._rest = b""
        self._next: asyncio.Task[EngineConnection] | None = None
        """The target's answer, once the source's is diverted."""
        self._has_gone_on = False
        """The engine was seen to have begun with what the answer had got."""
        self._held_at_s = 0.0
        self._has_given = asyncio.Event()
        self._mover: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------------------------- the answer

    def headers_for(self, ticket: Ticket) -> Headers:
        """The request's, for one engine."""
        headers = for_engine(self.asked.headers, shown=self.asked.shown, api_key=ticket.api_key)
        return [*headers, (NOTES_HEADER, b"1")] if self._is_moving else headers

    async def open(self, upstream: Upstream) -> None:
        """Send the request and wait for the head of the answer.

        Raises:
            EngineFailed: there is none.
        """
        try:
            engine = await upstream.post(
                self.ticket.url,
                target=self.asked.target,
                headers=self.headers_for(self.ticket),
                body=await self._body(),
                on_sent=self._sent,
            )
        except Diverted:
            engine = await self._diverted()
        self.engine = engine
        if self._owned is not None:
            await self._expect_goes_on(engine)
        elif self._is_moving and is_event_stream(engine.headers):
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
                    self._log_before, self._log = self.longest_log, TokenLog()
                continue
            if self._transcript is None:
                return data
            self._is_proven = self._is_proven or bool(data)
            if not data:
                return self._end()
            if events := self._whole_events(data):
                self._transcript.note(events)
                self._has_given.set()
                return events

    def _end(self) -> bytes:
        if self._continuation is not None and not self._continuation.is_even:
            raise EngineFailed("the engine that it was moved to ended before it was where the client is")
        rest, self._rest = self._rest, b""
        return rest

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

    async def moved_body(self) -> MovedBody:
        """The client's body, as a move reads it.

        Raises:
            NotMovable, ValueError: see ``MovedBody``.
        """
        body = self.asked.body
        return MovedBody(body) if is_small(body) else await asyncio.to_thread(MovedBody, body)

    async def _body(self) -> Body:
        if self._owned is None:
            return self.asked.body
        try:
            body = await self.moved_body()
        except (NotMovable, ValueError) as problem:
            raise EngineFailed(str(problem), FailureSign.REFUSED) from None
        key, shown = self.ticket.api_key, self.asked.shown
        return resumed_body(body, self._owned, prompt=None, key=key, request=shown)

    async def _expect_goes_on(self, engine: EngineConnection) -> None:
        """Of an answer that was begun elsewhere: the head of one that goes on."""
        assert self._transcript is not None
        if is_core_dead(engine):
            raise EngineFailed("its engine core has died", FailureSign.CORE_DIED)
        if engine.status != 200 or not is_event_stream(engine.headers):
            reply = await read_reply(engine)
            problem = f"the next engine does not go on: it answers {reply.status}: {reply.problem}"
            raise EngineFailed(problem, FailureSign.REFUSED)
        self._continuation = Continuation(self._transcript)

    @property
    def longest_log(self) -> TokenLog:
        """Of the engine that it is on, or the one before: a target begins with what it was given."""
        before = self._log_before
        return before if before is not None and before.num_tokens > self._log.num_tokens else self._log

    def resume(self) -> dict[str, Any] | None:
        """What an engine needs to go on with it; None if none can."""
        return self.longest_log.resume() if self._is_moving and self._transcript is not None else None

    def failure(self, error: EngineFailed, *, has_begun: bool) -> Failure:
        """What the gate is to know. ``has_begun``: the client has a part of the answer."""
        sign = FailureSign.CORE_DIED if self._log.has_died else error.sign
        can_go_on = has_begun and self.resume() is not None
        return Failure(str(error), sign, has_begun=can_go_on, is_proven=self._is_proven)

    def _whole_events(self, data: bytes) -> bytes:
        events, self._rest = split_events(self._rest + data)
        events = self._log.strip(events)
        if self._continuation is None:
            return events
        try:
            events = self._continuation.feed(events)
            if events and self._owned is not None and not self._has_gone_on:
                self._has_gone_on = self._log.goes_on_from(self._owned)
                if not self._has_gone_on:
                    raise NotAligned("it began anew")
            return events
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
            Continuation(self._transcript).feed(TokenLog().strip(events))

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


def is_core_dead(engine: EngineConnection) -> bool:
    """Whether an API server answers for a core that has died."""
    return value_of(engine.headers, CORE_HEADER) == DIED


def drop_answer(answer: asyncio.Task[EngineConnection]) -> None:
    """Whatever becomes of it, nobody wants it."""
    answer.cancel()  # an answer whose head has not come is aborted by that
    answer.add_done_callback(_abort)


def _abort(answer: asyncio.Task[EngineConnection]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        answer.result().abort()
