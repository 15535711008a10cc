"""What a compared policy knows of requests, replicas and nodes. Records; owned by ``Baseline``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sllm_vllm.router.core.facts import ModelSpec, Tier


class Phase(Enum):
    """Where a replica is, as a policy sees it."""

    HELD = "held"
    """Not ordered: its slots are not all free yet."""
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    """Gets nothing new; stopped when it has no request."""
    STOPPING = "stopping"


@dataclass(slots=True)
class Waiter:
    """A request that has not ended."""

    id: str
    model: str
    arrived_s: float
    prompt_tokens: int
    replica: str | None = None
    first_s: float | None = None
    attempts: int = 0
    was_preempted: bool = False


@dataclass(slots=True)
class View:
    """A replica."""

    id: str
    model: str
    node: str
    num_slots: int
    num_held: int
    """Slots that are its own already."""
    phase: Phase = Phase.HELD
    since_s: float = 0.0
    """Of its order, its readiness or its last request's end: what keep-alive counts from."""
    ongoing: set[str] = field(default_factory=set)
    num_incoming: int = 0
    """Requests that are moved to it."""
    waits_for: set[str] = field(default_factory=set)
    """Replicas that end for it."""


@dataclass(slots=True)
class NodeView:
    """A node, as far as it has reported."""

    id: str
    num_slots: int
    num_free: int
    residency: dict[str, Tier] = field(default_factory=dict)
    hops: dict[Tier, float] = field(default_factory=dict)
    load_until_s: float = 0.0

    def load_s(self, spec: ModelSpec, now_s: float) -> float:
        """ServerlessLLM's estimate (section 6 of its paper): wait in the load queue, and bytes over bandwidth."""
        return max(0.0, self.load_until_s - now_s) + self.weights_s(spec)

    def weights_s(self, spec: ModelSpec) -> float:
        """Bytes over bandwidth."""
        rate_bps = self.hops.get(self.residency.get(spec.name, Tier.REMOTE), 1e9)
        return spec.nbytes / rate_bps


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """Where to start. ``victims``: idle replicas that end for it. ``preempted``: busy ones whose requests begin again.
    ``moves``: busy ones whose requests go on elsewhere, each with its target: a replica, or a node to start one on."""

    node: str
    victims: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
