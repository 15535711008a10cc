"""The core's events (what happened to requests, replicas and nodes) and actions (what to do about it). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from sllm_vllm.router.core.facts import (
    FailureSign,
    FoundReplica,
    ModelSpec,
    RequestFacts,
    ResumeSample,
    StartSample,
    Tier,
)

# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class ModelDeployed:
    """A model was deployed, or its deployment was changed."""

    spec: ModelSpec
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """Where its weights are, by node, as far as known already."""


@dataclass(frozen=True, slots=True)
class ModelDeleted:
    """A model was deleted; it is no longer served."""

    model: str


@dataclass(frozen=True, slots=True)
class NodeReported:
    """A node's report: where it has models, and how fast its hops are. Models not named are REMOTE."""

    node: str
    is_warm: bool
    residency: Mapping[str, Tier] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of models' weights, where the node knows them."""
    hops: Mapping[Tier, float] = field(default_factory=dict)
    """Bytes per second from a tier to the device."""
    warm_in_s: float = 0.0
    """How long a start ordered now waits for the node's warm parent process, while that is still importing."""


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node joined, with slots for engines."""

    node: str
    num_slots: int
    is_warm: bool = True
    report: NodeReported | None = None
    """The node's first report, if it came with the join, so that the first start knows where the weights are."""
    found: tuple[FoundReplica, ...] = ()
    """Replicas that run on it already."""


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone, with everything that ran on it."""

    node: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client sent a request."""

    facts: RequestFacts


@dataclass(frozen=True, slots=True)
class RequestFound:
    """A request that runs on a replica already: an earlier process of this router sent it there."""

    facts: RequestFacts
    replica: str


@dataclass(frozen=True, slots=True)
class RequestGone:
    """The request's client left, before or after it was sent to a replica."""

    request: str


@dataclass(frozen=True, slots=True)
class FirstByte:
    """The first byte of the request's answer arrived."""

    request: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The answer is complete, successful or not. ``output_tokens``: if the engine reported them."""

    request: str
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request's replica failed it; it may be sent to another one.

    ``has_begun``: its client has part of the answer, which another replica may continue. ``is_proven``: this replica
    had begun to answer it.
    """

    request: str
    reason: str
    sign: FailureSign = FailureSign.BROKE_OFF
    has_begun: bool = False
    is_proven: bool = False


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The engine generated a token of an answer of which no byte has been seen yet."""

    request: str


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica is ready. ``sample``: what its start took, if known."""

    replica: str
    sample: StartSample | None = None


@dataclass(frozen=True, slots=True)
class ReplicaMovable:
    """Whether a replica's engine can hand over and take over running requests. Reported once that is known."""

    replica: str
    is_movable: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """An operator asked to move a request: to ``target``, or without one to the best replica."""

    request: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMoved:
    """A request runs on its target now. ``samples``: what each round of the migration took."""

    request: str
    target: str
    samples: tuple[ResumeSample, ...] = ()


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A migration failed; the request continues where it was. ``is_lasting``: it can't be moved at all."""

    request: str
    target: str
    reason: str
    is_lasting: bool = False
    samples: tuple[ResumeSample, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaEnded:
    """A replica's engine is gone, or never started.

    ``is_fault``: it was not told to end. ``is_unseen``: its agent does not know it, e.g. because the agent restarted,
    so no request is suspected.
    """

    replica: str
    reason: str = ""
    is_fault: bool = False
    is_unseen: bool = False


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """An operator asked to drain a replica, or a node: no request is cut off, and nothing new starts on the node."""

    target: str


@dataclass(frozen=True, slots=True)
class UndrainAsked:
    """An operator asked a drained node to take starts again."""

    node: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: deadlines, keep-alives and back-offs may have expired."""


Event = (
    ModelDeployed
    | ModelDeleted
    | NodeJoined
    | NodeReported
    | NodeLost
    | RequestArrived
    | RequestFound
    | RequestGone
    | FirstByte
    | FirstToken
    | RequestEnded
    | RequestFailed
    | ReplicaReady
    | ReplicaMovable
    | MoveAsked
    | RequestMoved
    | MoveFailed
    | ReplicaEnded
    | DrainAsked
    | UndrainAsked
    | Ticked
)

# ----------------------------------------------------------------------------------------------------------- actions


class Refusal(Enum):
    """Why a request is refused; mapped to an HTTP status by the caller."""

    UNKNOWN_MODEL = "unknown model"
    QUEUE_FULL = "queue full"
    TOO_LATE = "no capacity in time"
    NO_START = "its engine fails again and again"
    DELETED = "the model was deleted"
    ENGINE_FAILED = "its engine failed"
    KILLED_ENGINE = "this request, or one like it, ended its engine"


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start an engine. Its slots are free as far as the router knows; ``ReplicaEnded`` follows if it cannot start.

    ``timeout_s``: the start fails if the engine is not healthy by then.
    """

    replica: str
    model: str
    generation: int
    node: str
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class StopReplica:
    """Stop an engine on which no request runs."""

    replica: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send a request to a replica."""

    request: str
    replica: str
    attempt: int


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """Move a request to another replica. It keeps running meanwhile.

    ``RequestMoved`` or ``MoveFailed`` follows, unless the request ends first.
    """

    request: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class RejectRequest:
    """Tell the client that its request is refused."""

    request: str
    why: Refusal
    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class PrefetchModel:
    """Have a node read a model's checkpoint into memory, because a request for it is likely soon."""

    model: str
    node: str


@dataclass(frozen=True, slots=True)
class CopyCheckpoint:
    """Have ``node`` pull a hot model's checkpoint from ``source``. The node's reports show when it has arrived."""

    model: str
    source: str
    node: str


Action = StartReplica | StopReplica | Dispatch | MoveRequest | RejectRequest | PrefetchModel | CopyCheckpoint


@dataclass(slots=True)
class Todo:
    """What follows from an event, or from a part of its processing."""

    actions: list[Action] = field(default_factory=list)
    """To carry out, in this order."""
    models: dict[str, None] = field(default_factory=dict)
    """Models to look at again, in this order: their queues or replicas changed."""
    resumed: list[str] = field(default_factory=list)
    """Models of draining replicas that take requests again: their queues are served last."""
    has_room: bool = False
    """Slots may be free, or replicas idle, that other models could use."""
    is_short: bool = False
    """A model lacks a replica, and no place for it was found."""

    def do(self, action: Action | None) -> None:
        """Append an action, if there is one."""
        if action is not None:
            self.actions.append(action)

    def look_at(self, models: Iterable[str]) -> None:
        """Add models to look at again."""
        self.models.update(dict.fromkeys(models))

    def add(self, other: Todo | None) -> None:
        """Append what follows from a later part, if anything does. ``is_short`` is about one model and stays."""
        if other is not None:
            self.actions += other.actions
            self.models.update(other.models)
            self.resumed += other.resumed
            self.has_room = self.has_room or other.has_room


_FIELDS = ("request", "replica", "model", "node", "target", "source")


def is_about(what: Event | Action, name: str) -> bool:
    """Whether an event or action refers to the request, replica, model or node of this name."""
    if name in (getattr(what, field, None) for field in _FIELDS):
        return True
    facts: RequestFacts | None = getattr(what, "facts", None)
    spec: ModelSpec | None = getattr(what, "spec", None)
    return (facts is not None and name in (facts.id, facts.model)) or (spec is not None and name == spec.name)
