"""What a policy is to the simulated world, and the orders that only compared policies give. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sllm_vllm.router.core.events import Action, Event


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """Have a running request continue on another replica of its model; it runs on meanwhile."""

    request: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class PreemptRequest:
    """Take a running request from its replica; what it has answered is thrown away, and it waits again."""

    request: str
    replica: str


Order = Action | MoveRequest | PreemptRequest


class Policy(Protocol):
    """Decides. ``RouterCore`` is one as it is."""

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        """What is to be done about something that happened."""
        ...


@runtime_checkable
class Moving(Protocol):
    """A policy that moves requests, and is told when one has moved."""

    def moved(self, request: str, now_s: float) -> Sequence[Order]:
        """A request runs on its target now."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A policy that can check itself."""

    def validate(self) -> None:
        """Assert what must hold."""
        ...
