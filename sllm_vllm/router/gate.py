"""The interface between data path and controller: what the ingress asks for and reports. Records and Protocols.

The controller implements ``Gate``; ``http/ingress.py`` and ``http/proxy.py`` call it from the event loop they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sllm_vllm.router.core.facts import FailureSign, RequestFacts


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that clients may ask for.

    ``root``: where its weights come from; ``max_model_len``: its context length in tokens, None until an engine has
    reported it.
    """

    name: str
    created_unix_s: int
    root: str
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one request to one replica. ``attempt`` counts from 1 and grows with each retry.

    ``url`` has the form ``http://127.0.0.1:PORT``; ``api_key`` is the engine's key and is never shown to a client.
    """

    request: str
    replica: str
    model: str
    url: str
    api_key: str
    attempt: int


class Rejected(Exception):
    """A request gets no replica. Holds the error to answer with: ``kind`` is the ``type`` of an OpenAI error."""

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
    """How an engine failed a request. For ``has_begun`` and ``is_proven`` see ``RequestFailed``."""

    reason: str
    sign: FailureSign = FailureSign.BROKE_OFF
    has_begun: bool = False
    is_proven: bool = False


How = Literal["done", "client_left", "client_slow", "engine_failed", "timeout"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. ``status``: the engine's HTTP status; None if it did not answer.

    ``first_byte_s`` and ``seconds`` count from when the ticket was given. Token counts are the engine's own; None if it
    reports none.
    """

    how: How
    status: int | None
    first_byte_s: float | None
    seconds: float
    prompt_tokens: int | None
    output_tokens: int | None
    waited_s: float = 0.0
    """From its arrival at the ingress until the ticket was given."""


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """An order to move a request. ``source``: the replica it is expected on; ``target``: its ticket for the new one."""

    source: str
    target: Ticket


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What a move took until it ended.

    ``num_filled``: tokens that the target computed in ``num_rounds``; ``num_moved``: output tokens from which it
    continued; ``nbytes``: bytes transferred for the move; ``held_s``: how long the client got nothing before the
    target's answer took over; ``samples``: for each round, the tokens computed and the seconds taken.
    """

    num_rounds: int = 0
    num_filled: int = 0
    num_moved: int = 0
    nbytes: int = 0
    held_s: float = 0.0
    samples: tuple[tuple[int, float], ...] = ()


OnMove = Callable[[MoveOrder], None]


class Gate(Protocol):
    """Decides where each request goes. All calls come from one event loop."""

    def served(self) -> Sequence[ServedModel]:
        """The models that clients may ask for, in display order.

        The ingress reads a tuple once, until it gets a different one; any other sequence it reads at each request.
        """
        ...

    async def acquire(self, facts: RequestFacts) -> Ticket:
        """Wait for a replica.

        Cancelling the call removes the request from the queue and leaves no ticket behind, even if one was just given.

        Raises:
            Rejected: there is no replica, and waiting (any longer) makes no sense.
        """
        ...

    def first_byte(self, ticket: Ticket) -> None:
        """Report that the engine has begun to answer."""
        ...

    def first_token(self, ticket: Ticket) -> None:
        """Report that the engine has generated a token, though no byte has come. May be called twice, or late."""
        ...

    def finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """Report the end of a request. Called exactly once for each ticket, unless ``retry`` was called for it."""
        ...

    async def retry(self, ticket: Ticket, failure: Failure) -> Ticket:
        """Called instead of ``finished`` when the engine failed: wait for another replica.

        Either nothing was sent to the client, or ``failure.has_begun``: then the next replica continues the answer.

        The old ticket is void at once, however the call ends. Cancelling works as for ``acquire``.

        Raises:
            Rejected: there is no other replica.
        """
        ...

    def follow(self, ticket: Ticket, on_order: OnMove) -> None:
        """Accept orders to move this request, one at a time, until ``finished`` or ``retry``.

        Each order is answered with ``moved`` or ``not_moved``, unless the request ends first.
        """
        ...

    def moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport) -> None:
        """Report that an order was carried out. From now on its target is the request's ticket, in every later call."""
        ...

    def not_moved(self, ticket: Ticket, order: MoveOrder, report: MoveReport, *, reason: str, is_lasting: bool) -> None:
        """Report that an order failed; the request stays on its replica. ``is_lasting``: it can never be moved."""
        ...

    def is_ready(self) -> bool:
        """Whether it makes sense to send requests."""
        ...
