"""One request to an engine and its answer back, piece by piece. Called by ``ingress.py``, in the request's own task.

The head of an answer waits for the first byte of its body, so that an engine that dies before it can be replaced
without the client seeing anything. After that byte nothing is tried again: a stream of events ends with an error event,
any other body with a connection that closes too early.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from sllm_vllm.router.body import Body
from sllm_vllm.router.core.facts import FailureSign, RequestFacts
from sllm_vllm.router.engine_api import EngineApi
from sllm_vllm.router.gate import Gate, How, MoveOrder, Outcome, Rejected, Ticket
from sllm_vllm.router.headers import Headers, for_client
from sllm_vllm.router.leg import Asked, Leg, is_core_dead, is_event_stream
from sllm_vllm.router.mover import Mover
from sllm_vllm.router.openai_errors import SERVER, ApiError, engine_failed, not_served, rejection, timed_out
from sllm_vllm.router.proving import Proving
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.router.upstream import EngineConnection, EngineFailed, Upstream
from sllm_vllm.router.watch import Ended, Receive, Send, Watch, send_last

ATTEMPTS_MAX = 8
"""The gate says when it is enough; this is in case that it never does."""
_TAIL_PIECES = 4
_TAIL_NBYTES = 4096
_FRAMEWORK_ERROR_NBYTES_MAX = 256
# Quotes inside of generated text are escaped, so it can't look like this.
_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in. ``target``: path and query; ``shown``: its X-Request-Id."""

    facts: RequestFacts
    shown: str
    target: str
    headers: Headers
    body: Body

    @property
    def asked(self) -> Asked:
        """What engines get of it."""
        return Asked(self.target, self.headers, self.body, self.shown)


@dataclass(slots=True)
class Report:
    """What became of a request so far. ``status``: what the client was told."""

    replica: str = ""
    status: int | None = None
    how: How | Literal["rejected"] | None = None
    first_byte_s: float | None = None
    """From the ticket on."""
    attempts: int = 0
    arrived_s: float = field(default_factory=time.monotonic)
    begun_s: float = 0.0
    engine_status: int | None = None
    tail_pieces: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL_PIECES))

    def begin(self, ticket: Ticket) -> None:
        """A ticket is there."""
        self.replica = ticket.replica
        self.attempts += 1
        self.begun_s = time.monotonic()
        self.engine_status = None

    def outcome(self, how: How) -> Outcome:
        """For the gate."""
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
    """Sends requests where the gate says. Tells the gate the end of each ticket exactly once."""

    def __init__(self, gate: Gate, settings: IngressSettings) -> None:
        self._gate = gate
        self._settings = settings
        self._upstream = Upstream(settings)
        self._api = EngineApi(self._upstream)

    def close(self) -> None:
        """Close the connections to engines."""
        self._upstream.close()

    async def run(self, call: Call, report: Report, *, receive: Receive, send: Send, extra: Headers) -> None:
        """Carry a request to its end. ``extra``: headers of the answer.

        Raises:
            ApiError: nothing was sent to the client yet; this is what it has to be told.
            Ended: the client left; there is nobody to tell.
        """
        watch = Watch(receive, self._settings.request_s_max)
        answer = _Answer(call, report, send=send, extra=extra)
        error: ApiError | None = None
        try:
            async with watch:
                await self._carry(call, watch=watch, report=report, answer=answer)
        except Rejected as rejected:
            report.how = "rejected"
            error = rejection(rejected)
        except EngineFailed as failure:
            error = engine_failed(str(failure))
        except asyncio.CancelledError:  # the server stops, and its time for requests is over: there is time for a word
            error = rejection(Rejected(503, SERVER, "The router is stopping.", retry_after_s=5.0, code="stopping"))
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

    async def _carry(self, call: Call, *, watch: Watch, report: Report, answer: _Answer) -> None:
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

    async def _attempt(self, leg: Leg, call: Call, *, watch: Watch, report: Report, answer: _Answer) -> None:
        limit_s = self._settings.first_byte_s_max
        watch.begin_step(limit_s, f"the engine sent nothing for {limit_s or 0:g} s")
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

    async def _pass_on(self, leg: Leg, *, watch: Watch, report: Report, answer: _Answer, proving: Proving) -> None:
        piece = await leg.read()
        proving.cancel()
        watch.pause()
        if report.status is None:
            report.first_byte_s = time.monotonic() - report.begun_s
            piece = await _begin(leg, answer, piece)
        if piece:  # before all else: a client waits for it
            report.tail_pieces.append(piece[-_TAIL_NBYTES:])
            await answer.write(piece)
        self._gate.first_byte(leg.ticket)
        watch.begin_step(self._settings.idle_s_max, f"the engine paused for more than {self._settings.idle_s_max:g} s")
        while piece:
            watch.resume()
            piece = await leg.read()
            watch.pause()
            if piece:
                report.tail_pieces.append(piece[-_TAIL_NBYTES:])
                await answer.write(piece, is_last=leg.is_at_end)

    def _begin_to_prove(self, leg: Leg) -> Proving:
        """Ask the engine whether it has generated a token, for as long as none is seen."""
        proving = Proving(leg, self._gate, self._api)
        if leg.is_moving:
            proving.begin()
        return proving

    def _start_mover(self, leg: Leg, order: MoveOrder) -> asyncio.Task[None]:
        assert self._settings.moves is not None
        mover = Mover(leg, order, self._gate, upstream=self._upstream, settings=self._settings.moves)
        return asyncio.get_running_loop().create_task(mover.run())


async def _begin(leg: Leg, answer: _Answer, piece: bytes) -> bytes:
    """Send the head; what is left of the first piece to be sent."""
    if _is_route_missing(leg.head, piece):
        await answer.refuse()
        return b""
    await answer.begin(leg.head)
    return piece


class _Answer:
    """What the client sees of an answer."""

    def __init__(self, call: Call, report: Report, *, send: Send, extra: Headers) -> None:
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
        """Say that the engine lacks the route, in the form that the route's clients read."""
        path = self._call.target.partition("?")[0]
        error = not_served(self._call.facts.model, path)
        self._report.status = error.status
        self._last = error.body_for(path)
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(self._last)).encode())]
        await self._send({"type": "http.response.start", "status": error.status, "headers": [*kind, *self._extra]})

    async def write(self, piece: bytes, *, is_last: bool = False) -> None:
        """A last piece waits for ``end``, which follows at once: one packet instead of two."""
        if is_last:
            self._last = piece
            return
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await send_last(self._send, {"type": "http.response.body", "body": self._last, "more_body": False})

    async def break_off(self, error: ApiError) -> None:
        """Only a stream of events has a way to say it. Any other body stays unfinished, which closes the connection."""
        if self._is_events:
            pieces = self._report.tail_pieces
            last = pieces[-1] if pieces else b"\n\n"
            gap = b"" if last.endswith(b"\n\n") else b"\n\n"
            event = gap + error.event(self._call.target)
            await send_last(self._send, {"type": "http.response.body", "body": event, "more_body": False})


def _is_route_missing(engine: EngineConnection, piece: bytes) -> bool:
    """Whether an answer is a web framework's own 404 or 405; vLLM's own errors say what is wrong under ``error``."""
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
