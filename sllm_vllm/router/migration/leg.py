"""One request's answer as its client receives it, whichever engine it comes from. Data path; one per ticket.

A leg reads from one engine until a ``Mover`` diverts it; then the target's answer continues where the client is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sllm_vllm.engine.answer_notes import CORE_HEADER, DIED, NOTES_HEADER
from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.engine_client.api import read_reply
from sllm_vllm.router.engine_client.connection import Diverted, EngineConnection, EngineFailed, Upstream
from sllm_vllm.router.engine_client.headers import Headers, for_engine, value_of
from sllm_vllm.router.gate import Failure, Gate, MoveOrder, MoveReport, Ticket
from sllm_vllm.router.http.admission import Body, is_small
from sllm_vllm.router.migration.moved_body import MovedBody, NotMovable, resumed_body
from sllm_vllm.router.migration.token_log import TokenLog
from sllm_vllm.router.migration.transcript import Continuation, NotAligned, Transcript, split_events

MOVABLE_TARGETS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Asked:
    """What engines are sent. ``target``: path and query; ``headers``: the client's; ``shown``: its X-Request-Id."""

    target: str
    headers: Headers
    body: Body
    shown: str

    @property
    def is_movable(self) -> bool:
        """Whether answers of this path can continue at another engine."""
        return self.target.partition("?")[0] in MOVABLE_TARGETS


class Leg:
    """One ticket's answer. ``close`` ends it, and a move that is under way.

    Args:
        is_moving: whether orders to move are carried out at all.
        before: the same request's leg whose engine failed after the client had a part of the answer; this leg continues
            it.
    """

    def __init__(self, ticket: Ticket, asked: Asked, gate: Gate, *, is_moving: bool, before: Leg | None = None) -> None:
        self.ticket = ticket
        self.asked = asked
        self.engine: EngineConnection | None = None
        self._gate = gate
        self._is_moving = is_moving and asked.is_movable
        self._transcript: Transcript | None = None if before is None else before._transcript
        self._owned = None if before is None else before.resume()
        """What the answer had so far when its engine failed."""
        self._log = TokenLog()
        self._log_before: TokenLog | None = None if before is None else before.longest_log
        self._is_proven = False
        """Its engine has sent a part of the answer."""
        self._continuation: Continuation | None = None
        self._rest = b""
        self._next: asyncio.Task[EngineConnection] | None = None
        """The target's answer, once the source's has been diverted."""
        self._has_gone_on = False
        """The engine's notes have shown that its answer begins with ``_owned``."""
        self._held_at_s = 0.0
        self._has_given = asyncio.Event()
        self._mover: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------------------------- the answer

    def headers_for(self, ticket: Ticket) -> Headers:
        """The request's headers for one engine."""
        headers = for_engine(self.asked.headers, shown=self.asked.shown, api_key=ticket.api_key)
        return [*headers, (NOTES_HEADER, b"1")] if self._is_moving else headers

    async def open(self, upstream: Upstream) -> None:
        """Send the request and wait for the head of the answer.

        Raises:
            EngineFailed: no head came, or the engine does not continue an answer that was begun elsewhere.
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
        """The next bytes for the client; empty at the end. A stream that can move gives whole events only.

        Raises:
            EngineFailed: the answer ended too early.
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
        """Whether the answer may continue at another engine, as far as the leg knows."""
        return self._is_moving

    @property
    def head(self) -> EngineConnection:
        """The engine's connection, for the status and headers of the answer."""
        assert self.engine is not None
        return self.engine

    @property
    def is_at_end(self) -> bool:
        """Whether the whole answer has been read."""
        return self.engine is not None and self.engine.is_at_end and not self._rest

    def close(self) -> None:
        """End the answer, here and at a move's target. Does not wait: the request's task may be being cancelled."""
        if self._mover is not None:
            self._mover.cancel()
        if self._next is not None:
            drop_answer(self._next)
        if self.engine is not None:
            self.engine.close()

    def _sent(self, engine: EngineConnection) -> None:
        self.engine = engine

    async def moved_body(self) -> MovedBody:
        """The client's body in the form that a move needs.

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
        """Check the head of an answer that has to continue one begun elsewhere."""
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
        """The longer of the engine's log and the one before it: a new engine first repeats the tokens it was given."""
        before = self._log_before
        return before if before is not None and before.num_tokens > self._log.num_tokens else self._log

    def resume(self) -> dict[str, Any] | None:
        """What another engine needs to continue the answer; None if none can."""
        return self.longest_log.resume() if self._is_moving and self._transcript is not None else None

    def failure(self, error: EngineFailed, *, has_begun: bool) -> Failure:
        """The failure to report to the gate. ``has_begun``: the client has a part of the answer."""
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

    # ------------------------------------------------------------------------------------------------------ moving

    def follow(self, start: Callable[[Leg, MoveOrder], asyncio.Task[None]]) -> None:
        """Accept orders to move; ``start`` begins to carry one out."""

        def on_order(order: MoveOrder) -> None:
            problem = self._why_not(order)
            if problem:
                is_lasting = not self._is_moving
                self._gate.not_moved(self.ticket, order, MoveReport(), reason=problem, is_lasting=is_lasting)
            else:
                self._mover = start(self, order)

        self._gate.follow(self.ticket, on_order)

    async def wait_given(self, seconds_max: float) -> None:
        """Wait until a stream's client gets its next events: holding right after an event delays the client least."""
        if self._transcript is None:
            return
        self._has_given.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                await self._has_given.wait()

    def hold(self) -> bool:
        """Give the client nothing more until ``release`` or ``divert``; False if there is nothing to hold."""
        self._held_at_s = time.monotonic()
        return self.engine is not None and self.engine.hold()

    def release(self) -> None:
        """Continue with the engine's own answer."""
        if self.engine is not None:
            self.engine.release()

    def divert(self, order: MoveOrder, answer: asyncio.Task[EngineConnection]) -> bool:
        """Continue with the target's answer from where the client is. False if the source's answer is already whole."""
        if self.engine is None or not self.engine.divert():
            return False
        self.ticket = order.target
        self._next = answer
        return True

    def check_aligned(self, events: bytes) -> None:
        """Check that a target's whole answer continues from where the client is.

        Raises:
            NotAligned: it is an error, or ends before that.
        """
        if self._transcript is not None:
            Continuation(self._transcript).feed(TokenLog().strip(events))

    @property
    def held_s(self) -> float:
        """Seconds since ``hold``."""
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
    """Whether an answer is a stream of events that can be read as it is: not compressed, and without a length."""
    is_open = not value_of(headers, b"content-encoding") and not value_of(headers, b"content-length")
    return is_open and value_of(headers, b"content-type").strip().lower().startswith(b"text/event-stream")


def is_core_dead(engine: EngineConnection) -> bool:
    """Whether the API server answers that its engine core has died."""
    return value_of(engine.headers, CORE_HEADER) == DIED


def drop_answer(answer: asyncio.Task[EngineConnection]) -> None:
    """Discard an answer that is no longer needed, whether it has begun or not."""
    answer.cancel()  # aborts the request if the head of its answer has not come
    answer.add_done_callback(_abort)


def _abort(answer: asyncio.Task[EngineConnection]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        answer.result().abort()
