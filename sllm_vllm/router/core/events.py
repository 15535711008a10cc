"""What happens to requests, replicas and nodes, and what is to be done about it. Pure: events in, actions out."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A model is to be served, or is now to be served otherwise."""

    spec: ModelSpec
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """Where its weights are, by node, as far as that is known already."""


@dataclass(frozen=True, slots=True)
class ModelDeleted:
    """It is not to be served any more."""

    model: str


@dataclass(frozen=True, slots=True)
class NodeReported:
    """Where a node has models, and how fast its hops are. Models that are not named are REMOTE."""

    node: str
    is_warm: bool
    residency: Mapping[str, Tier] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    """Of models' weights, where the node knows them."""
    hops: Mapping[Tier, float] = field(default_factory=dict)
    """Bytes a second from a tier to the device."""
    warm_in_s: float = 0.0
    """Of a warm node whose parent process still imports: how long a start that comes now waits for it."""


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node has slots for engines."""

    node: str
    num_slots: int
    is_warm: bool = True
    report: NodeReported | None = None
    """Its first one, if it came with it: so that the first start knows where the weights are."""
    found: tuple[FoundReplica, ...] = ()
    """What runs on it already."""


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone, with all that ran on it."""

    node: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """Somebody wants an answer."""

    facts: RequestFacts


@dataclass(frozen=True, slots=True)
class RequestFound:
    """It runs on a replica already: an earlier life of the router sent it there."""

    facts: RequestFacts
    replica: str


@dataclass(frozen=True, slots=True)
class RequestGone:
    """Whoever waited for it left, before it was sent to a replica or after."""

    request: str


@dataclass(frozen=True, slots=True)
class FirstByte:
    """Its answer has begun."""

    request: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """It was answered, well or not; nothing more will be sent. ``output_tokens``: if its engine told."""

    request: str
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Its replica failed: it may be sent to another one.

    ``has_begun``: its client has a part of the answer, and whoever streams it can have it continued elsewhere.
    ``is_proven``: this replica had answered it, in part.
    """

    request: str
    reason: str
    sign: FailureSign = FailureSign.BROKE_OFF
    has_begun: bool = False
    is_proven: bool = False


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Its engine has generated a token of an answer of which nothing was seen yet."""

    request: str


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """It answers. ``sample``: what its start took, if that is known."""

    replica: str
    sample: StartSample | None = None


@dataclass(frozen=True, slots=True)
class ReplicaMovable:
    """Its engine can, or can't, hand over and take over requests that run; as long as nobody knows it can't."""

    replica: str
    is_movable: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """An operator wants a request to go on elsewhere; without a target wherever is best."""

    request: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMoved:
    """It runs on its target now. ``samples``: what getting there took."""

    request: str
    target: str
    samples: tuple[ResumeSample, ...] = ()


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """It goes on where it was. ``is_lasting``: it can't be moved at all."""

    request: str
    target: str
    reason: str
    is_lasting: bool = False
    samples: tuple[ResumeSample, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaEnded:
    """Its engine is gone, or was never there.

    ``is_fault``: nobody had asked for its end. ``is_unseen``: its agent does not know it, as one that was started again
    does not; so no request is suspected.
    """

    replica: str
    reason: str = ""
    is_fault: bool = False
    is_unseen: bool = False


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """An operator wants a replica, or all of a node, to end without harm to a request; nothing more starts there."""

    target: str


@dataclass(frozen=True, slots=True)
class UndrainAsked:
    """A node that was drained is to take starts again."""

    node: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: deadlines, keep-alives and back-offs may be over."""


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
    """Why a request is not served, for whoever turns it into a status."""

    UNKNOWN_MODEL = "unknown model"
    QUEUE_FULL = "queue full"
    TOO_LATE = "no capacity in time"
    NO_START = "its engine does not start"
    DELETED = "the model was deleted"
    ENGINE_FAILED = "its engine failed"
    KILLED_ENGINE = "this request, or one like it, ended its engine"


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start an engine. Its slots are free, as far as is known; ``ReplicaEnded`` says if it can't be had.

    ``timeout_s``: it is a failure if it is not healthy by then.
    """

    replica: str
    model: str
    generation: int
    node: str
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End an engine; no request runs on it."""

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
    """Have a request go on at another replica; it runs on meanwhile. ``RequestMoved`` or ``MoveFailed`` follows, unless
    it ends first."""

    request: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class RejectRequest:
    """Tell whoever waits that there will be no answer."""

    request: str
    why: Refusal
    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class PrefetchModel:
    """Have a node read a model's checkpoint into memory: a request for it is likely soon."""

    model: str
    node: str


@dataclass(frozen=True, slots=True)
class CopyCheckpoint:
    """Have a node pull a model's checkpoint from another one: the model is hot. Its reports tell when it is there."""

    model: str
    source: str
    node: str


Action = StartReplica | StopReplica | Dispatch | MoveRequest | RejectRequest | PrefetchModel | CopyCheckpoint
