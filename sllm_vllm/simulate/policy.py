"""The interface between a policy and the simulated world, and the one order that only compared policies give. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sllm_vllm.router.core.events import Action, Event


@dataclass(frozen=True, slots=True)
class PreemptRequest:
    """Take a running request from its replica; its answer so far is discarded, and it waits again."""

    request: str
    replica: str


Order = Action | PreemptRequest


class SchedulingPolicy(Protocol):
    """A scheduling policy. ``RouterCore`` is one without any adapter."""

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        """Return the orders that answer an event."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A policy that can check its invariants."""

    def validate(self) -> None:
        """Assert every invariant."""
        ...
