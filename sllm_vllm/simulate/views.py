"""A compared policy's records of requests, replicas and nodes. Owned by ``Baseline``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sllm_vllm.router.core.facts import ModelSpec, Tier


class ReplicaPhase(Enum):
    """Where a replica is in its life cycle, as a policy sees it."""

    HELD = "held"
    """Not ordered: its slots are not all free yet."""
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    """Gets no new requests; stopped once it has none."""
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
    """Slots that are already reserved for it."""
    phase: ReplicaPhase = ReplicaPhase.HELD
    since_s: float = 0.0
    """When it was ordered, became ready, or its last request ended, whichever was last; keep-alive counts from then."""
    ongoing: set[str] = field(default_factory=set)
    num_incoming: int = 0
    """Requests that are being moved to it."""
    waits_for: set[str] = field(default_factory=set)
    """Replicas that must end before it can start."""


@dataclass(slots=True)
class NodeView:
    """A node, as last reported."""

    id: str
    num_slots: int
    num_free: int
    residency: dict[str, Tier] = field(default_factory=dict)
    hops: dict[Tier, float] = field(default_factory=dict)
    load_until_s: float = 0.0

    def load_s(self, spec: ModelSpec, now_s: float) -> float:
        """ServerlessLLM's estimate (section 6 of its paper): wait in the load queue, plus bytes over bandwidth."""
        return max(0.0, self.load_until_s - now_s) + self.weights_s(spec)

    def weights_s(self, spec: ModelSpec) -> float:
        """Bytes over bandwidth."""
        rate_bps = self.hops.get(self.residency.get(spec.name, Tier.REMOTE), 1e9)
        return spec.nbytes / rate_bps


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """Where to start a replica, and which others make room. ``victims``: idle replicas to end. ``preempted``: busy
    ones, whose requests begin again. ``moves``: busy ones, whose requests continue elsewhere, each with its target: a
    replica, or a node to start one on."""

    node: str
    victims: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
