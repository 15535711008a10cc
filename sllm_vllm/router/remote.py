"""What an ingress and a controller in different processes say to each other. Frozen records and Protocols; pure.

An ingress has a session at the controller. It asks for tickets, tells what becomes of them, and polls for news; polling
is also how it shows that it lives. Whoever finds the other one new (a controller that was restarted, a session that
was written off) begins with ``enter``, which tells what the ingress holds: nothing is kept on both sides for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, MoveOrder, MoveReport, Outcome, Rejected, ServedModel, Ticket
from sllm_vllm.router.settings import IngressSettings

POLL_S = 2.0
"""Longest that a poll without news stays open."""
SILENT_S_MAX = 10.0
"""An ingress that does not poll for so long is written off: nobody reads what its requests' engines say."""
NOTES_MAX = 4096
"""Of one batch; more go with the next."""


class ControllerGone(Exception):
    """Nobody answers at the controller, or it died in the middle of an answer; a new one comes by itself."""


@dataclass(frozen=True, slots=True)
class Held:
    """A request that an ingress streams from a replica. ``is_followed``: it takes orders to move."""

    facts: RequestFacts
    ticket: Ticket
    is_followed: bool = False


@dataclass(frozen=True, slots=True)
class Welcome:
    """What an ingress needs to know to begin."""

    settings: IngressSettings
    version: int


@dataclass(frozen=True, slots=True)
class Refused:
    """``Rejected``, as a record."""

    status: int
    kind: str
    message: str
    retry_after_s: float | None
    code: str | None

    @classmethod
    def of(cls, rejected: Rejected) -> Refused:
        """The record of it."""
        return cls(rejected.status, rejected.kind, rejected.message, rejected.retry_after_s, rejected.code)

    def error(self) -> Rejected:
        """It again."""
        return Rejected(self.status, self.kind, self.message, retry_after_s=self.retry_after_s, code=self.code)


@dataclass(frozen=True, slots=True)
class Unknown:
    """The controller has no session of this ingress: it has to enter (again)."""


Answer = Ticket | Refused | Unknown


@dataclass(frozen=True, slots=True)
class Began:
    """Its first byte was seen."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Proved:
    """Its engine has generated a token."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Finished:
    """It has ended."""

    ticket: Ticket
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Left:
    """Its client left before there was a ticket, or as one came."""

    request: str


@dataclass(frozen=True, slots=True)
class Followed:
    """It takes orders to move from now on."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Moved:
    """An order was followed."""

    facts: RequestFacts
    ticket: Ticket
    order: MoveOrder
    report: MoveReport


@dataclass(frozen=True, slots=True)
class NotMoved:
    """An order was not."""

    ticket: Ticket
    order: MoveOrder
    report: MoveReport
    reason: str
    is_lasting: bool


Note = Began | Proved | Finished | Left | Followed | Moved | NotMoved


@dataclass(frozen=True, slots=True)
class News:
    """``served`` and ``settings`` are None where nothing changed since ``version``."""

    version: int
    is_ready: bool
    served: tuple[ServedModel, ...] | None = None
    settings: IngressSettings | None = None
    orders: tuple[MoveOrder, ...] = ()


class ControllerLink(Protocol):
    """A controller from afar. Every call raises ``ControllerGone`` if it does not answer."""

    async def enter(self, ingress: str, held: Sequence[Held]) -> Welcome:
        """Begin a session, or begin it again, with everything that is held."""
        ...

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """A ticket for a request. Asked again it is the same request."""
        ...

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """Another ticket for one whose engine failed."""
        ...

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """What became of tickets, in order; False if there is no session."""
        ...

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """News since ``version``, or none after ``POLL_S``."""
        ...
