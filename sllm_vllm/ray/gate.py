"""A ``Gate`` whose controller is in another process. Runs on the ingress's loop; independent of the transport.

While the controller is away, running requests continue, and new ones wait for it. Nothing is queued for a controller
that died: the next one is sent what is held, and asked again for the tickets that are waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from sllm_vllm.ray.session import (
    NOTES_MAX,
    Answer,
    Began,
    CallRefused,
    ControllerGone,
    ControllerLink,
    Finished,
    Followed,
    Held,
    Left,
    Moved,
    News,
    Note,
    NotMoved,
    Proved,
    Unknown,
)
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, OnMove, Outcome, ServedModel, Ticket

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
PAUSE_S_MAX = 1.0
"""Pauses between attempts to reach a controller that is away grow from ``PAUSE_S`` to ``PAUSE_S_MAX``."""


class RemoteGate:
    """One ingress's session with its controller.

    Args:
        name: of this ingress; unique, and never used again.
        on_settings: called with the settings when they are first known, and whenever they change.
    """

    def __init__(self, name: str, link: ControllerLink, *, on_settings: Callable[[IngressSettings], None]) -> None:
        self.name = name
        self._link = link
        self._on_settings = on_settings
        self._held: dict[str, Held] = {}
        self._followers: dict[str, OnMove] = {}
        self._served: tuple[ServedModel, ...] = ()
        self._is_ready = False
        self._version = 0
        self._has_entered = asyncio.Event()
        self._notes: list[Note] = []
        self._flushing: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin the session; returns when the controller has accepted it."""
        self._session = asyncio.get_running_loop().create_task(self._keep_session())
        self._session.add_done_callback(_tell_failure)
        await self._has_entered.wait()

    async def close(self) -> None:
        """Stop without a word: the controller drops an ingress that does not poll."""
        for task in (self._session, self._flushing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # ----------------------------------------------------------------------------------------------------- as a gate

    def served(self) -> Sequence[ServedModel]:
        """See ``Gate``."""
        return self._served

    def is_ready(self) -> bool:
        """See ``Gate``."""
        return self._is_ready and self._has_entered.is_set()

    async def acquire(self, facts: RequestFacts) -> Ticket:
        """See ``Gate``."""
        return await self._ticket(facts)

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        """See ``Gate``."""
        self._followers.pop(ticket.request, None)
        return await self._ticket(self._held.pop(ticket.request).facts, ticket, failure)

    def first_byte(self, ticket: Ticket) -> None:
        """See ``Gate``."""
        self._note(Began(ticket))

    def first_token(self, ticket: Ticket) -> None:
        """See ``Gate``."""
        self._note(Proved(ticket))

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """See ``Gate``."""
        self._held.pop(ticket.request, None)
        self._followers.pop(ticket.request, None)
        self._note(Finished(ticket, outcome))

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        """See ``Gate``."""
        self._followers[ticket.request] = on_order
        self._held[ticket.request] = replace(self._held[ticket.request], is_followed=True)
        self._note(Followed(ticket))

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        """See ``Gate``."""
        held = self._held[ticket.request]
        self._held[ticket.request] = replace(held, ticket=order.target)
        self._note(Moved(held.facts, ticket, order, report))

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        """See ``Gate``."""
        self._note(NotMoved(ticket, order, report, reason, is_lasting))

    async def _ticket(
        self, facts: RequestFacts, failed: Ticket | None = None, failure: Failure | None = None
    ) -> Ticket:
        try:
            while True:
                await self._has_entered.wait()
                answer = await self._ask(facts, failed, failure)
                if isinstance(answer, Ticket):
                    self._held[facts.id] = Held(facts, answer)
                    return answer
                if isinstance(answer, CallRefused):
                    raise answer.error()
        except asyncio.CancelledError:
            self._note(Left(facts.id))
            raise

    async def _ask(self, facts: RequestFacts, failed: Ticket | None, failure: Failure | None) -> Answer:
        """Ask the controller once. Returns ``Unknown`` whenever there is no answer."""
        try:
            if failed is None or failure is None:
                answer = await self._link.acquire(self.name, facts)
            else:
                answer = await self._link.retry(self.name, failed, facts=facts, failure=failure)
        except ControllerGone:
            answer = Unknown()
        if isinstance(answer, Unknown):
            self._has_entered.clear()
        return answer

    # ---------------------------------------------------------------------------------------------------- the session

    async def _keep_session(self) -> None:
        """Enter and follow the news; repeat until cancelled."""
        pause_s = PAUSE_S
        while True:
            try:
                welcome = await self._link.enter(self.name, tuple(self._held.values()))
                self._version = welcome.version
                self._on_settings(welcome.settings)
                # Drop all other notes: ``enter`` has just said which requests are held and on which replicas.
                left = [note for note in self._notes if isinstance(note, Left)]
                self._notes.clear()
                self._has_entered.set()
                for note in left:
                    self._note(note)
                pause_s = PAUSE_S
                await self._follow_news()
            except ControllerGone as problem:
                logger.warning("event=controller_gone ingress=%s reason=%r", self.name, str(problem))
            self._has_entered.clear()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    async def _follow_news(self) -> None:
        """Poll for news until the session ends."""
        while self._has_entered.is_set():
            news = await self._link.poll(self.name, self._version)
            if isinstance(news, Unknown):
                return
            self._take(news)

    def _take(self, news: News) -> None:
        self._version, self._is_ready = news.version, news.is_ready
        if news.served is not None:
            self._served = news.served
        if news.settings is not None:
            self._on_settings(news.settings)
        for order in news.orders:
            held, follower = self._held.get(order.target.request), self._followers.get(order.target.request)
            if held is None:
                continue  # the request has ended, and a note says so
            if follower is not None:
                follower(order)
            else:
                self.not_moved(held.ticket, order, MoveReport(), reason="no ingress streams it", is_lasting=False)

    def _note(self, note: Note) -> None:
        if not self._has_entered.is_set() and not isinstance(note, Left):
            return  # ``enter`` will say what is held, so nothing piles up while the controller is away
        self._notes.append(note)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Send all notes. Those that can't be sent are not needed: see ``_keep_session``."""
        while self._notes and self._has_entered.is_set():
            batch, self._notes = self._notes[:NOTES_MAX], self._notes[NOTES_MAX:]
            try:
                if not await self._link.note(self.name, batch):
                    self._has_entered.clear()
            except ControllerGone:
                self._has_entered.clear()


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("event=session_failed", exc_info=error)
