"""The seam between data path and controller: what the ingress asks for, and what it tells. Records and Protocols.

The controller implements ``Gate``; ``ingress.py`` and ``proxy.py`` call it from the loop they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sllm_vllm.router.core.facts import FailureSign, RequestFacts


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a client may ask for it.

    ``root``: where its weights come from; ``max_model_len``: tokens of its context, None as long as no engine has said
    it.
    """

    name: str
    created_unix_s: int
    root: str
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one request to one replica. ``attempt`` counts from 1 and grows with each retry.

    ``url`` is of the form ``http://127.0.0.1:PORT``; ``api_key`` is the engine's and is never shown to a client.
    """

    request: str
    replica: str
    model: str
    url: str
    api_key: str
    attempt: int


class Rejected(Exception):
    """A request that gets no replica, and how to say so: ``kind`` is the ``type`` of an OpenAI error."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s
        self.code = code


@dataclass(frozen=True, slots=True)
class Failure:
    """How an engine failed a request. ``has_begun`` and ``is_proven``: see ``RequestFailed``."""

    reason: str
    sign: FailureSign = FailureSign.BROKE_OFF
    has_begun: bool = False
    is_proven: bool = False


How = Literal["done", "client_left", "client_slow", "engine_failed", "timeout"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. ``status``: what the engine answered; None: it did not.

    ``first_byte_s`` and ``seconds`` count from the moment the ticket was there. Tokens as the engine reports them; None
    if it does not.
    """

    how: How
    status: int | None
    first_byte_s: float | None
    seconds: float
    prompt_tokens: int | None
    output_tokens: int | None
    waited_s: float = 0.0
    """From its arrival at the ingress until the ticket was there."""


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """A request is to go on elsewhere. ``source``: the replica it should be on; ``target``: its ticket there."""

    source: str
    target: Ticket


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What a move took, up to its end.

    ``num_filled``: tokens that the target computed in ``num_rounds``; ``num_moved``: output tokens that it went on
    from; ``nbytes``: what went over the wire for it; ``held_s``: how long the client got nothing before the target's
    answer took over; ``samples``: tokens that one round computed, and its seconds.
    """

    num_rounds: int = 0
    num_filled: int = 0
    num_moved: int = 0
    nbytes: int = 0
    held_s: float = 0.0
    samples: tuple[tuple[int, float], ...] = ()


OnMove = Callable[[MoveOrder], None]


class Gate(Protocol):
    """Who decides where a request goes. All calls come from one loop."""

    def served(self) -> Sequence[ServedModel]:
        """The models that may be asked for, in the order to show them.

        A tuple is read once, and again when another one is given; any other sequence at each request.
        """
        ...

    async def acquire(self, facts: RequestFacts) -> Ticket:
        """Wait for a replica.

        Cancelling it takes the request out of the queue, and leaves no ticket behind, also if one was just given.

        Raises:
            Rejected: there is none, and waiting (any longer) makes no sense.
        """
        ...

    def first_byte(self, ticket: Ticket) -> None:
        """The engine has begun to answer."""
        ...

    def first_token(self, ticket: Ticket) -> None:
        """The engine has generated a token of an answer of which nothing came yet. May be said twice, or late."""
        ...

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """The request has ended. Called exactly once for each ticket, unless ``retry`` was called for it."""
        ...

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        """Instead of ``finished``: the engine failed; wait for another replica.

        Either nothing went to the client, or ``failure.has_begun``: then the next replica gives the rest.

        The old ticket is void at once, whatever becomes of the call. Cancelling it is as for ``acquire``.

        Raises:
            Rejected: there is no other replica.
        """
        ...

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        """From now on, and until ``finished`` or ``retry``, this request takes orders to move; one at a time.

        ``moved`` or ``not_moved`` answers each of them, unless the request ends first.
        """
        ...

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        """The order was followed: the ticket is the order's from now on, also for ``finished`` and ``retry``."""
        ...

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        """It could not be; the request goes on where it is. ``is_lasting``: it never can be."""
        ...

    def is_ready(self) -> bool:
        """Whether requests make sense at all."""
        ...
