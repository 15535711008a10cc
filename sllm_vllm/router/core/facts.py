"""The core's plain records: models, requests, tiers, and samples of what starts took. Pure and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """Limits of starting replicas.

    ``plans_max``: nodes examined per start and kind of plan. ``hungry_max``: models lacking slots that are tried after
    each event. ``starve_s``: how long the oldest request waits before its model counts as starving; then no waiting
    model may overtake it, and busy replicas are drained for it. ``prefetch_s``: how long before its likely next request
    a model is prefetched. ``slack_s``: see ``best_plan``. ``start_s_least``, ``start_s_most``: range of a start's
    timeout if its model sets none. ``name_suffix``: ends every replica's name, so that two routers of a cluster never
    use the same name.
    """

    plans_max: int = 8
    hungry_max: int = 4
    starve_s: float = 30.0
    prefetch_s: float = 30.0
    slack_s: float = 0.1
    start_s_least: float = 120.0
    start_s_most: float = 600.0
    name_suffix: str = ""


@dataclass(frozen=True, slots=True)
class MoveLimits:
    """Limits of migrations. ``moves_max``: at once; ``per_target_max``: at once to one replica.

    ``failures_max``: failed migrations of a request after which it stays where it is. ``pause_s``: pause after a
    failure before the request may be moved again.
    """

    is_on: bool = True
    moves_max: int = 4
    per_target_max: int = 2
    failures_max: int = 2
    pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PoisonLimits:
    """Limits for requests that may kill engines.

    ``quarantine_s``: how long a digest is refused, or tried alone. ``digests_max``: most digests remembered of either
    kind. ``verdict_s``: longest wait of a failed request until it is known whether its engine died. ``trial_s``: a
    suspect is cleared once its engine has survived it for this long. ``last_replica_s``: how long a suspect waits
    before it may be tried on the last ready replica of a model that may have more. ``resumes_max``: how often a stream
    continues on another replica before it ends with an error.
    """

    quarantine_s: float = 600.0
    digests_max: int = 1024
    verdict_s: float = 15.0
    trial_s: float = 30.0
    last_replica_s: float = 30.0
    resumes_max: int = 2


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """Limits of copying hot checkpoints between nodes.

    ``holders_max``: most nodes that hold one checkpoint; below 2 nothing is copied. ``at_once_max``: copies at once in
    the cluster. ``copy_s_max``: when a copy is given up.
    """

    holders_max: int = 0
    at_once_max: int = 2
    copy_s_max: float = 900.0


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """All limits of the core.

    ``waiting_max``: most waiting requests of all models. ``attempts_max``: most replicas that get a request.
    ``story_max``: events and actions that are remembered.
    """

    waiting_max: int = 4096
    attempts_max: int = 2
    story_max: int = 20_000
    scaling: ScalingLimits = field(default_factory=ScalingLimits)
    moves: MoveLimits = field(default_factory=MoveLimits)
    copies: CopyLimits = field(default_factory=CopyLimits)
    poison: PoisonLimits = field(default_factory=PoisonLimits)


class Tier(IntEnum):
    """Where a model's weights are on a node, fastest first."""

    HOST = 0
    """In memory, in the store."""
    DISK = 1
    REMOTE = 2
    """No checkpoint on the node: it is fetched, or the model is read the stock way and converted."""


class Term(Enum):
    """A part of the time from a decision to a first token, in seconds."""

    QUEUE = "queue"
    """Waiting: for other loads on the node, for slots to be freed, for a start under way, for room."""
    PROCESS = "process"
    """Starting the process, imports and workers; warm or cold."""
    INIT = "init"
    """Building the module, KV cache, compilation, graphs, warm-up, opening the port."""
    WEIGHTS = "weights"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as it was deployed. ``generation`` changes when anything changes that requires new engines.

    ``start_s_max``: how long a start may take; None: derived from the prediction. ``queue_s_max``: how long a request
    waits at most; with ``waits_for_start`` longer, if an engine that is starting for it is predicted to be ready later.
    ``keep_alive_s``: how long an idle replica is kept; None: as long as it is worth its memory. ``target_ongoing``:
    requests a replica should have at once; more start another replica. ``ongoing_max``: most that a replica ever gets.
    """

    name: str
    generation: int = 0
    lineage: int = 0
    """Requests may move between engines of the same lineage, even of different generations."""
    accelerators: int = 1
    min_replicas: int = 0
    max_replicas: int = 1
    keep_alive_s: float | None = None
    target_ongoing: int = 8
    ongoing_max: int = 64
    priority: int = 0
    """Higher is served first."""
    queue_max: int = 256
    queue_s_max: float = 120.0
    waits_for_start: bool = False
    start_s_max: float | None = None
    nbytes: int = 0
    """Size of its weights; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A request as it arrived. ``prefix``: equal for requests that begin alike; empty if unknown."""

    id: str
    model: str
    priority: int = 0
    """Added to its model's priority."""
    prompt_tokens: int = 0
    """May be a guess."""
    prefix: str = ""
    deadline_s: float | None = None
    """When to stop waiting for a replica, by the events' clock; None: after the model's ``queue_s_max``."""
    digest: str = ""
    """Digest of its body: equal for equal requests. Empty if the body was not hashed."""


class FailureSign(Enum):
    """How a replica failed a request."""

    UNREACHED = "unreached"
    """No connection: the replica never got the request."""
    REFUSED = "refused"
    """The replica answered that it does not serve the request now."""
    BROKE_OFF = "broke off"
    """The replica got the request, and the connection ended before the answer did."""
    CORE_DIED = "core died"
    """The replica's API server says that its engine core has died."""


@dataclass(frozen=True, slots=True)
class FoundReplica:
    """A replica that runs already when its node joins: an earlier process of this router ordered it.

    ``requests``: those that are being streamed from it. It holds its slots also while it starts or stops.
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
    """What one start took, as reported by its engine."""

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
    """What a first token took on an engine that was ready and had room for it."""

    model: str
    node: str
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ResumeSample:
    """What one prefill took at the target of a migration."""

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
        """Sum of all terms."""
        return sum(self.terms.values())
