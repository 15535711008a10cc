"""Sends one request to an engine and its answer back, piece by piece. Called by ``ingress.py``, in the request's task.

The head of an answer is held back until the first byte of its body, so that an engine that dies earlier can be
replaced without the client noticing. After that byte, only a stream that can continue elsewhere
(``migration/leg.py``) gets another engine. Any other stream of events ends with an error event, and any other body with
a connection that closes too early.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import FailureSign, RequestFacts
from sllm_vllm.router.engine_client.api import EngineApi
from sllm_vllm.router.engine_client.connection import EngineConnection, EngineFailed, Upstream
from sllm_vllm.router.engine_client.headers import Headers, for_client
from sllm_vllm.router.engine_client.proving import Proving
from sllm_vllm.router.gate import Gate, How, MoveOrder, Outcome, Rejected, Ticket
from sllm_vllm.router.http.admission import Body
from sllm_vllm.router.http.deadline import Ended, Receive, Send, Watch, send_last
from sllm_vllm.router.http.errors import ApiError, engine_failed, not_served, rejection, stopping, timed_out
from sllm_vllm.router.migration.leg import Asked, Leg, is_core_dead, is_event_stream
from sllm_vllm.router.migration.mover import Mover

ATTEMPTS_MAX = 8
"""A safeguard: the gate should refuse further retries earlier."""
_TAIL_PIECES = 4
_TAIL_NBYTES = 4096
_FRAMEWORK_ERROR_NBYTES_MAX = 256
# Quotes inside generated text are escaped, so it can't match.
_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """An admitted request. ``target``: path and query; ``shown``: its X-Request-Id."""

    facts: RequestFacts
    shown: str
    target: str
    headers: Headers
    body: Body

    @property
    def asked(self) -> Asked:
        """The part of it that engines are sent."""
        return Asked(self.target, self.headers, self.body, self.shown)


@dataclass(slots=True)
class Report:
    """What has happened to a request so far. ``status``: the HTTP status that the client was sent."""

    replica: str = ""
    status: int | None = None
    how: How | Literal["rejected"] | None = None
    first_byte_s: float | None = None
    """Counted from when the ticket was given."""
    attempts: int = 0
    arrived_s: float = field(default_factory=time.monotonic)
    begun_s: float = 0.0
    engine_status: int | None = None
    tail_pieces: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL_PIECES))

    def begin(self, ticket: Ticket) -> None:
        """Begin an attempt with a new ticket."""
        self.replica = ticket.replica
        self.attempts += 1
        self.begun_s = time.monotonic()
        self.engine_status = None

    def outcome(self, how: How) -> Outcome:
        """The outcome to report to the gate."""
        self.how = how
        tail = b"".join(self.tail_pieces)[-_TAIL_NBYTES:]
        return Outcome(
            how=how,
            status=self.engine_status,
            first_byte_s=self.first_byte_s,
            seconds=time.monotonic() - self.begun_s,
            waited_s=self.begun_s - self.arrived_s,
            prompt_tokens=_last_number(_PROMPT_TOKENS, tail),
            output_tokens=_last_number(_OUTPUT_TOKENS, tail),
        )


class Proxy:
    """Sends requests to the replicas that the gate chooses. Reports the end of each ticket to it exactly once."""

    def __init__(self, gate: Gate, settings: IngressSettings) -> None:
        self._gate = gate
        self._settings = settings
        self._upstream = Upstream()
        self._api = EngineApi(self._upstream)

    def close(self) -> None:
        """Close the connections to engines."""
        self._upstream.close()

    async def run(self, call: AdmittedRequest, report: Report, *, receive: Receive, send: Send, extra: Headers) -> None:
        """Handle a request until its end. ``extra``: headers to add to the answer.

        Raises:
            ApiError: nothing has been sent to the client yet; the caller has to answer with this error.
            Ended: the client left, so there is nothing to answer.
        """
        watch = Watch(receive, self._settings.request_timeout)
        answer = _ClientAnswer(call, report, send=send, extra=extra)
        error: ApiError | None = None
        try:
            async with watch:
                await self._carry(call, watch=watch, report=report, answer=answer)
        except Rejected as rejected:
            report.how = "rejected"
            error = rejection(rejected)
        except EngineFailed as failure:
            error = engine_failed(str(failure))
        except asyncio.CancelledError:  # the server stops and its drain time is over; the client still gets an error
            error = rejection(stopping())
        except Ended as ended:
            report.how = ended.reason
            if ended.reason != "timeout":
                raise
            error = timed_out(ended.problem)
        if error is None:
            await answer.end()
        elif report.status is None:
            raise error
        else:
            await answer.break_off(error)

    async def _carry(self, call: AdmittedRequest, *, watch: Watch, report: Report, answer: _ClientAnswer) -> None:
        watch.begin_step(None, "")
        ticket = await self._gate.acquire(call.facts)
        before: Leg | None = None
        while True:
            report.begin(ticket)
            leg = Leg(ticket, call.asked, self._gate, is_moving=self._settings.moves is not None, before=before)
            try:
                await self._attempt(leg, call, watch=watch, report=report, answer=answer)
            except EngineFailed as failure:
                told = leg.failure(failure, has_begun=report.status is not None)
                if (report.status is not None and not told.has_begun) or report.attempts >= ATTEMPTS_MAX:
                    self._gate.finished(leg.ticket, report.outcome("engine_failed"))
                    raise
            except asyncio.CancelledError:
                self._gate.finished(leg.ticket, report.outcome(watch.reason or "client_left"))
                raise
            except BaseException:
                self._gate.finished(leg.ticket, report.outcome("engine_failed"))
                raise
            else:
                self._gate.finished(leg.ticket, report.outcome("done"))
                return
            watch.begin_step(None, "")
            before = leg if told.has_begun else None
            ticket = await self._gate.retry(leg.ticket, told)

    async def _attempt(
        self, leg: Leg, call: AdmittedRequest, *, watch: Watch, report: Report, answer: _ClientAnswer
    ) -> None:
        leg.follow(self._start_mover)
        proving = self._begin_to_prove(leg)
        try:
            await leg.open(self._upstream)
            engine = leg.head
            report.engine_status = engine.status
            if not 200 <= engine.status < 600:
                raise EngineFailed("it answers with what is not HTTP", FailureSign.REFUSED)
            if is_core_dead(engine):
                raise EngineFailed("its engine core has died", FailureSign.CORE_DIED)
            if engine.status == 401 or (engine.status == 503 and report.attempts == 1):
                raise EngineFailed(f"it answers {engine.status}", FailureSign.REFUSED)
            await self._pass_on(leg, watch=watch, report=report, answer=answer, proving=proving)
        finally:
            proving.cancel()
            report.replica = leg.ticket.replica
            leg.close()

    async def _pass_on(
        self, leg: Leg, *, watch: Watch, report: Report, answer: _ClientAnswer, proving: Proving
    ) -> None:
        piece = await leg.read()
        proving.cancel()
        watch.pause()
        if report.status is None:
            report.first_byte_s = time.monotonic() - report.begun_s
            piece = await _begin(leg, answer, piece)
        if piece:  # before anything else: the client is waiting for it
            report.tail_pieces.append(piece[-_TAIL_NBYTES:])
            await answer.write(piece)
        self._gate.first_byte(leg.ticket)
        idle_s = self._settings.idle_timeout
        watch.begin_step(idle_s, f"the engine paused for more than {idle_s:g} s")
        while piece:
            watch.resume()
            piece = await leg.read()
            watch.pause()
            if piece:
                report.tail_pieces.append(piece[-_TAIL_NBYTES:])
                await answer.write(piece, is_last=leg.is_at_end)

    def _begin_to_prove(self, leg: Leg) -> Proving:
        """Ask the engine whether it has generated a token, until one is seen."""
        proving = Proving(leg, self._gate, self._api)
        if leg.is_moving:
            proving.begin()
        return proving

    def _start_mover(self, leg: Leg, order: MoveOrder) -> asyncio.Task[None]:
        assert self._settings.moves is not None
        mover = Mover(leg, order, self._gate, upstream=self._upstream, settings=self._settings.moves)
        return asyncio.get_running_loop().create_task(mover.run())


async def _begin(leg: Leg, answer: _ClientAnswer, piece: bytes) -> bytes:
    """Send the head; returns what remains to be sent of the first piece."""
    if _is_route_missing(leg.head, piece):
        await answer.refuse()
        return b""
    await answer.begin(leg.head)
    return piece


class _ClientAnswer:
    """The answer as the client sees it."""

    def __init__(self, call: AdmittedRequest, report: Report, *, send: Send, extra: Headers) -> None:
        self._call = call
        self._report = report
        self._send = send
        self._extra = extra
        self._is_events = False
        self._last = b""

    async def begin(self, engine: EngineConnection) -> None:
        headers = for_client(engine.headers)
        self._is_events = is_event_stream(headers)
        self._report.status = engine.status
        await self._send({"type": "http.response.start", "status": engine.status, "headers": [*headers, *self._extra]})

    async def refuse(self) -> None:
        """Answer that the engine lacks the route, in the form that the route's clients expect."""
        path = self._call.target.partition("?")[0]
        error = not_served(self._call.facts.model, path)
        self._report.status = error.status
        self._last = error.body_for(path)
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(self._last)).encode())]
        await self._send({"type": "http.response.start", "status": error.status, "headers": [*kind, *self._extra]})

    async def write(self, piece: bytes, *, is_last: bool = False) -> None:
        """Send a piece. The last one is left to ``end``, which follows at once: one packet instead of two."""
        if is_last:
            self._last = piece
            return
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await send_last(self._send, {"type": "http.response.body", "body": self._last, "more_body": False})

    async def break_off(self, error: ApiError) -> None:
        """End a failed answer.

        Only a stream of events can carry the error; any other body stays incomplete, which closes the connection.
        """
        if self._is_events:
            pieces = self._report.tail_pieces
            last = pieces[-1] if pieces else b"\n\n"
            gap = b"" if last.endswith(b"\n\n") else b"\n\n"
            event = gap + error.event(self._call.target)
            await send_last(self._send, {"type": "http.response.body", "body": event, "more_body": False})


def _is_route_missing(engine: EngineConnection, piece: bytes) -> bool:
    """Whether an answer is the web framework's own 404 or 405. vLLM's own errors have an object under ``error``."""
    if engine.status not in {404, 405} or len(piece) > _FRAMEWORK_ERROR_NBYTES_MAX:
        return False
    try:
        found = json.loads(piece or b"null")
    except ValueError:
        return True
    return not (isinstance(found, dict) and isinstance(found.get("error"), dict))


def _last_number(pattern: re.Pattern[bytes], tail: bytes) -> int | None:
    found = pattern.findall(tail)
    return int(found[-1]) if found else None
