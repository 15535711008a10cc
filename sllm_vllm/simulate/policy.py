"""What a policy is to the simulated world, and the order that only a compared policy gives. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sllm_vllm.router.core.events import Action, Event


@dataclass(frozen=True, slots=True)
class PreemptRequest:
    """Take a running request from its replica; what it has answered is thrown away, and it waits again."""

    request: str
    replica: str


Order = Action | PreemptRequest


class Policy(Protocol):
    """Decides. ``RouterCore`` is one as it is."""

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        """What is to be done about something that happened."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A policy that can check itself."""

    def validate(self) -> None:
        """Assert what must hold."""
        ...
