"""Models, requests, tiers, and samples of what starts took, as the core knows them. Pure, frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Tier(IntEnum):
    """Where a model's weights are on a node, the fastest first."""

    HOST = 0
    """In the store's memory."""
    DISK = 1
    REMOTE = 2
    """Not on the node as a checkpoint: fetched, or read the stock way and converted."""


class Term(Enum):
    """A part of the time from a decision to a first token. All are seconds."""

    QUEUE = "queue"
    """Waiting: for other loads on the node, for slots to come free, for a start under way, for room."""
    PROCESS = "process"
    """Process, imports and workers; warm or cold."""
    INIT = "init"
    """Module, KV cache, compile, graphs, warm-up, port."""
    WEIGHTS = "weights"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as it was deployed. ``generation`` grows when anything changes that its engines must be started with.

    ``start_s_max``: how long a start may take; None: what is predicted says. ``queue_s_max``: longest that a request
    waits; ``waits_for_start``: longer where an engine that is starting for it is predicted to be ready later.
    ``keep_alive_s``: how long an idle replica stays; None: as long as that is worth its memory. ``target_ongoing``:
    requests a replica should have at once; more start another one. ``ongoing_max``: more are never sent to one.
    """

    name: str
    generation: int = 0
    lineage: int = 0
    """Requests may move between its engines, and to those of another generation if this is the same."""
    accelerators: int = 1
    min_replicas: int = 0
    max_replicas: int = 1
    keep_alive_s: float | None = None
    target_ongoing: int = 8
    ongoing_max: int = 64
    priority: int = 0
    """Higher goes first."""
    queue_max: int = 256
    queue_s_max: float = 120.0
    waits_for_start: bool = False
    start_s_max: float | None = None
    nbytes: int = 0
    """Of its weights, as far as that is known; 0 if it is not."""


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A request as it arrived. ``prefix``: equal for requests that begin alike; empty if that is not known."""

    id: str
    model: str
    priority: int = 0
    """Added to its model's."""
    prompt_tokens: int = 0
    """A guess is enough."""
    prefix: str = ""
    deadline_s: float | None = None
    """When waiting makes no sense any more, by the clock of the events; None: the model's ``queue_s_max``."""
    digest: str = ""
    """Of its body: equal for requests that ask the same. Empty if nobody hashed it."""


class FailureSign(Enum):
    """What was seen of a replica that failed a request."""

    UNREACHED = "unreached"
    """No connection: it never got the request."""
    REFUSED = "refused"
    """It answered that it does not serve it now."""
    BROKE_OFF = "broke off"
    """It got the request, and the connection ended before the answer did."""
    CORE_DIED = "core died"
    """Its API server says that its engine core has died."""


@dataclass(frozen=True, slots=True)
class FoundReplica:
    """A replica that runs already when its node joins: an earlier life of the router ordered it.

    ``requests``: those that are streamed from it. It has slots, also while it starts or stops.
    """

    id: str
    model: str
    generation: int
    lineage: int
    num_slots: int
    is_ready: bool
    is_stopping: bool = False
    requests: tuple[RequestFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class StartSample:
    """What one start took, by its engine's own report."""

    model: str
    node: str
    is_warm: bool
    tier: Tier
    nbytes: int
    process_s: float
    init_s: float
    weights_s: float


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """What a first token took on an engine that was ready and had room."""

    model: str
    node: str
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ResumeSample:
    """What one prefill took that made a target ready for a request that moves to it."""

    model: str
    node: str
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by term, in the order of ``Term``."""

    terms: Mapping[Term, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """All of them."""
        return sum(self.terms.values())
