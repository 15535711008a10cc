"""The controller's side of ingresses in other processes, one session each. Runs on the controller's loop.

Unlike within one process, a call may arrive twice, an answer may be lost, an ingress may die while it holds tickets,
and an ingress may hold tickets from before the controller was restarted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sllm_vllm.ray.session import (
    POLL_S,
    SILENT_S_MAX,
    Answer,
    Began,
    CallRefused,
    Finished,
    Followed,
    Held,
    Left,
    Moved,
    News,
    Note,
    NotMoved,
    Proved,
    SessionWelcome,
    Unknown,
)
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, Rejected, ServedModel, Ticket

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    """One ingress. ``asking``: requests that wait for a ticket; ``held``: those it streams; ``ordered``: open moves."""

    heard_s: float
    asking: dict[str, asyncio.Task[Ticket]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    ordered: dict[str, MoveOrder] = field(default_factory=dict)
    orders: list[MoveOrder] = field(default_factory=list)
    """Orders to move that have not been sent yet."""
    has_news: asyncio.Event = field(default_factory=asyncio.Event)


class GateService:
    """All sessions. Reports the requests of lost ingresses, and those an ingress has lost, to the controller as gone.

    Args:
        clock: returns seconds; measures how long ingresses are silent.
    """

    def __init__(self, controller: Controller, settings: IngressSettings, *, clock: Callable[[], float]) -> None:
        self._controller = controller
        self._settings = settings
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._is_open = asyncio.Event()
        self._version = 1
        self._served: Sequence[ServedModel] = ()

    # --------------------------------------------------------------------------------------------------- for its owner

    def open(self) -> None:
        """Begin to give tickets. Called when the nodes' running replicas have been taken over."""
        self._is_open.set()

    def held_by_replica(self) -> Mapping[str, tuple[RequestFacts, ...]]:
        """Requests that the controller does not know, by the replica to which an earlier run of it sent them."""
        known = self._controller.core.requests
        found: dict[str, tuple[RequestFacts, ...]] = {}
        for session in self._sessions.values():
            for name, one in session.held.items():
                if name not in known:
                    found[one.ticket.replica] = (*found.get(one.ticket.replica, ()), one.facts)
        return found

    def set_settings(self, settings: IngressSettings) -> None:
        """Send new settings to every ingress, with its next poll."""
        self._settings = settings
        self._change()

    @property
    def num_ingresses(self) -> int:
        """How many ingresses have a session."""
        return len(self._sessions)

    def sweep(self) -> None:
        """Drop ingresses that are silent for too long, and send model changes to the others. Call it once a second."""
        for name in [name for name, one in self._sessions.items() if self._clock() - one.heard_s > SILENT_S_MAX]:
            logger.warning("event=ingress_lost ingress=%s", name)
            self._end(name)
        self._look_at_models()

    # --------------------------------------------------------------------------------------------------- for ingresses

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """See ``ControllerLink``."""
        before = self._sessions.get(ingress)
        session = self._sessions[ingress] = _Session(self._clock())
        if before is not None:
            session.asking = before.asking
            kept = {one.facts.id for one in held}
            for request in [name for name in before.held if name not in kept]:
                self._controller.gone(request)
            for request, order in before.ordered.items():  # the ingress may not have received it
                self._controller.call_off_move(request, order)
        logger.info("event=ingress_entered ingress=%s held=%d", ingress, len(held))
        for one in held:
            self._take_in(session, one)
        self._look_at_models()
        return SessionWelcome(self._settings, 0)

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """See ``ControllerLink``."""
        session = self._sessions.get(ingress)
        if session is None:
            return Unknown()
        if (held := session.held.get(facts.id)) is not None:  # our first answer was lost
            return held.ticket
        return await self._answer(ingress, facts, lambda: self._controller.acquire(facts))

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """See ``ControllerLink``."""
        session = self._sessions.get(ingress)
        if session is None:
            return Unknown()
        now = session.held.get(facts.id)
        if now is not None and now.ticket != ticket:  # our first answer was lost
            return now.ticket
        session.held.pop(facts.id, None)
        if facts.id in self._controller.core.requests:
            return await self._answer(ingress, facts, lambda: self._controller.retry(ticket, failure))
        if failure.has_begun:  # a restarted controller does not know where the answer can continue
            return CallRefused.of(Rejected(502, "server_error", failure.reason, code="engine_failed"))
        return await self._answer(ingress, facts, lambda: self._controller.acquire(facts))

    async def _answer(
        self, ingress: str, facts: RequestFacts, ask: Callable[[], Coroutine[Any, Any, Ticket]]
    ) -> Answer:
        request = facts.id
        asking = self._sessions[ingress].asking.get(request)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self._once_open(ask))
            self._sessions[ingress].asking[request] = asking
        try:
            ticket = await asyncio.shield(asking)
        except Rejected as rejected:
            return CallRefused.of(rejected)
        except asyncio.CancelledError:
            if asking.cancelled():  # its client left, so this answer is not read; or its ingress was dropped
                return Unknown()
            raise
        finally:
            session = self._sessions.get(ingress)  # the ingress may have begun a new session
            if asking.done() and session is not None and session.asking.get(request) is asking:
                del session.asking[request]
        if session is None:  # its ingress was dropped
            self._controller.gone(request)
            return Unknown()
        session.held[request] = Held(facts, ticket)
        return ticket

    async def _once_open(self, ask: Callable[[], Coroutine[Any, Any, Ticket]]) -> Ticket:
        await self._is_open.wait()
        return await ask()

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """See ``ControllerLink``."""
        session = self._sessions.get(ingress)
        if session is None:
            return False
        for one in notes:
            self._take_note(session, one)
        return True

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """See ``ControllerLink``."""
        session = self._sessions.get(ingress)
        if session is None:
            return Unknown()
        session.heard_s = self._clock()
        if not session.orders and version == self._version:
            session.has_news.clear()
            try:
                async with asyncio.timeout(POLL_S):
                    await session.has_news.wait()
            except TimeoutError:
                pass
        session.heard_s = self._clock()
        orders, session.orders = tuple(session.orders), []
        is_new = version != self._version
        return News(
            version=self._version,
            is_ready=self._controller.is_ready() and self._is_open.is_set(),
            served=tuple(self._controller.served()) if is_new else None,
            settings=self._settings if is_new else None,
            orders=orders,
        )

    # --------------------------------------------------------------------------------------------------------- internal

    def _take_in(self, session: _Session, held: Held) -> None:
        ticket = held.ticket
        session.held[ticket.request] = held
        if ticket.replica in self._controller.core.cluster.replicas:  # else it is found when its node joins
            self._controller.found(held.facts, ticket.replica)
        if held.is_followed:
            self._follow(session, ticket)

    def _take_note(self, session: _Session, note: Note) -> None:
        match note:
            case Began():
                self._controller.first_byte(note.ticket)
            case Proved():
                self._controller.first_token(note.ticket)
            case Finished():
                session.held.pop(note.ticket.request, None)
                session.ordered.pop(note.ticket.request, None)
                self._controller.finished(note.ticket, note.outcome)
            case Left():
                self._left(session, note.request)
            case Followed():
                self._follow(session, note.ticket)
            case Moved():
                self._moved(session, note)
            case NotMoved():
                if session.ordered.pop(note.ticket.request, None) == note.order:
                    self._controller.not_moved(
                        note.ticket, note.order, note.report, reason=note.reason, is_lasting=note.is_lasting
                    )

    def _moved(self, session: _Session, note: Moved) -> None:
        request = note.ticket.request
        session.held[request] = Held(note.facts, note.order.target)
        if session.ordered.pop(request, None) == note.order:
            self._controller.moved(note.ticket, note.order, note.report)
        else:  # an earlier run of the controller ordered it
            self._controller.gone(request)
            self._controller.found(note.facts, note.order.target.replica)

    def _left(self, session: _Session, request: str) -> None:
        asking = session.asking.pop(request, None)
        if asking is not None:
            asking.cancel()
        elif session.held.pop(request, None) is not None:
            self._controller.gone(request)

    def _follow(self, session: _Session, ticket: Ticket) -> None:
        def order(move: MoveOrder) -> None:
            session.ordered[ticket.request] = move
            session.orders.append(move)
            session.has_news.set()

        self._controller.follow(ticket, order)

    def _end(self, ingress: str) -> None:
        session = self._sessions.pop(ingress)
        for asking in session.asking.values():
            asking.cancel()
        for request in session.held:
            self._controller.gone(request)

    def _look_at_models(self) -> None:
        served = self._controller.served()
        if served is not self._served:
            self._served = served
            self._change()

    def _change(self) -> None:
        self._version += 1
        for session in self._sessions.values():
            session.has_news.set()
