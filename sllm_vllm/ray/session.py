"""The protocol between an ingress and a controller in different processes. Frozen records and Protocols; pure.

An ingress has a session at the controller. It asks for tickets, reports what becomes of them, and polls for news; a
poll is also its sign of life. If the controller was restarted or has dropped the session, the ingress calls ``enter``
again, which says all that it holds. So neither side has to keep the other's state for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, Outcome, Rejected, ServedModel, Ticket

POLL_S = 2.0
"""How long a poll stays open without news."""
SILENT_S_MAX = 10.0
"""An ingress that has not polled for this long is dropped: it no longer reads its engines' answers."""
NOTES_MAX = 4096
"""Notes in one batch; more are sent with the next."""


class ControllerGone(Exception):
    """The controller does not answer, or died while answering. It is restarted automatically; then ``enter`` again."""


@dataclass(frozen=True, slots=True)
class Held:
    """A request that an ingress streams from a replica. ``is_followed``: it accepts orders to move."""

    facts: RequestFacts
    ticket: Ticket
    is_followed: bool = False


@dataclass(frozen=True, slots=True)
class SessionWelcome:
    """What an ingress needs to know to begin a session."""

    settings: IngressSettings
    version: int


@dataclass(frozen=True, slots=True)
class CallRefused:
    """``Rejected`` as a record."""

    status: int
    kind: str
    message: str
    retry_after_s: float | None
    code: str | None

    @classmethod
    def of(cls, rejected: Rejected) -> CallRefused:
        """Make the record of an error."""
        return cls(rejected.status, rejected.kind, rejected.message, rejected.retry_after_s, rejected.code)

    def error(self) -> Rejected:
        """The error that the record was made of."""
        return Rejected(self.status, self.kind, self.message, retry_after_s=self.retry_after_s, code=self.code)


@dataclass(frozen=True, slots=True)
class Unknown:
    """The controller has no session of this ingress, which has to enter (again)."""


Answer = Ticket | CallRefused | Unknown


@dataclass(frozen=True, slots=True)
class Began:
    """The first byte of the request's answer has arrived."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Proved:
    """The request's engine has generated a token."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Finished:
    """The request has ended."""

    ticket: Ticket
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Left:
    """The request's client left before a ticket was given, or just as it was."""

    request: str


@dataclass(frozen=True, slots=True)
class Followed:
    """The request accepts orders to move from now on."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Moved:
    """An order to move was carried out."""

    facts: RequestFacts
    ticket: Ticket
    order: MoveOrder
    report: MoveReport


@dataclass(frozen=True, slots=True)
class NotMoved:
    """An order to move was not carried out."""

    ticket: Ticket
    order: MoveOrder
    report: MoveReport
    reason: str
    is_lasting: bool


Note = Began | Proved | Finished | Left | Followed | Moved | NotMoved


@dataclass(frozen=True, slots=True)
class News:
    """The answer to a poll. ``served`` and ``settings`` are None if nothing has changed since the poll's version."""

    version: int
    is_ready: bool
    served: tuple[ServedModel, ...] | None = None
    settings: IngressSettings | None = None
    orders: tuple[MoveOrder, ...] = ()


class ControllerLink(Protocol):
    """A connection to a remote controller. Every call raises ``ControllerGone`` if the controller does not answer."""

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """Begin a session, or begin it again, with everything that the ingress holds."""
        ...

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """Get a ticket for a request. A repeated call with the same request is not a second request."""
        ...

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """Get another ticket for a request whose engine failed."""
        ...

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """Report what became of tickets, in order; False if there is no session."""
        ...

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """Wait for news since ``version``; returns without any after ``POLL_S``."""
        ...
