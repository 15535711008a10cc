"""What the core remembers about each model and each request. Pure; owned by ``RouterCore``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sllm_vllm.router.core.facts import Estimate, ModelSpec, RequestFacts, StartSample, Term
from sllm_vllm.router.core.keep_alive import Arrivals, AutoscaleState

BACK_OFF_S = 1.0
BACK_OFF_S_MAX = 60.0
_DOUBLINGS_MAX = 16
"""More would exceed the maximum anyway, and a thousand would overflow a float."""
STEADY_S = 30.0
"""A replica that has been ready this long works: earlier failures of its model are forgotten."""
FAILURES_MAX = 3
"""Failed starts in a row after which waiting requests are refused, and new ones too until the next attempt."""
SERVICE_SHARE = 0.2
"""Weight of the newest request in the running means."""


@dataclass(slots=True)
class BackOff:
    """Consecutive failed starts of a model; each doubles the pause before the next attempt.

    A replica that fails before it has been ready for ``STEADY_S`` counts as a failed start, too.
    """

    num_failures: int = 0
    until_s: float = 0.0
    reason: str = ""

    def failed(self, reason: str, now_s: float) -> None:
        """Count a failed start. Further starts that fail during the pause count as the same failure."""
        self.reason = reason
        if self.is_resting(now_s):
            return
        self.num_failures += 1
        self.until_s = now_s + min(BACK_OFF_S_MAX, BACK_OFF_S * 2.0 ** min(self.num_failures - 1, _DOUBLINGS_MAX))

    def succeeded(self) -> None:
        """Forget all failures: a replica works, or the next start may be tried at once."""
        self.num_failures, self.until_s, self.reason = 0, 0.0, ""

    def is_resting(self, now_s: float) -> bool:
        """Whether no start may be tried now."""
        return now_s < self.until_s

    @property
    def is_hopeless(self) -> bool:
        """Whether requests should not wait for the next attempt."""
        return self.num_failures >= FAILURES_MAX


@dataclass(slots=True)
class ModelState:
    """One deployed model."""

    spec: ModelSpec
    arrivals: Arrivals = field(default_factory=Arrivals)
    autoscale: AutoscaleState = field(default_factory=AutoscaleState)
    back_off: BackOff = field(default_factory=BackOff)
    num_ongoing: int = 0
    """Requests that are on replicas now."""
    num_kept: int = 0
    """Requests that waited when it was last deployed: they keep waiting even if its ``queue_max`` is less now."""
    service_s: float = 0.0
    """Running mean of the time a request spends on its replica; 0 before the first one ended."""
    token_s: float = 0.0
    """Running mean of the time between two output tokens; 0 before the first report."""

    def served(self, seconds: float) -> None:
        """Learn from a request that spent ``seconds`` on its replica."""
        share = SERVICE_SHARE if self.service_s else 1.0
        self.service_s += share * (max(0.0, seconds) - self.service_s)

    def generated(self, num_tokens: int, seconds: float) -> None:
        """Learn from an answer of ``num_tokens`` that took ``seconds`` after its first byte."""
        if num_tokens > 1 and seconds > 0:
            share = SERVICE_SHARE if self.token_s else 1.0
            self.token_s += share * (seconds / (num_tokens - 1) - self.token_s)


@dataclass(slots=True)
class Request:
    """One request, from its arrival to its end. Without a replica it waits: in the queue, or for a verdict."""

    facts: RequestFacts
    arrived_s: float
    replica: str | None = None
    dispatched_s: float = 0.0
    away_s: float = 0.0
    """Seconds spent on replicas that got it and failed it; not queueing time."""
    attempt: int = 0
    num_unreached: int = 0
    """Attempts whose replica could not be reached. They don't count: no engine got the request."""
    was_alone: bool = False
    """No other request was on its replica when it was sent there, so the time to its first byte is its prefill."""
    is_answered: bool = False
    """The first byte of its answer was seen."""
    answered_s: float = 0.0
    """When the first byte was seen."""
    target: str | None = None
    """The replica that it is moving to; it has a place there, too."""
    num_move_failures: int = 0
    move_after_s: float = 0.0
    """Earliest time of its next migration."""
    stays: bool = False
    """It can't be moved."""
    is_proven: bool = False
    """The replica that it is on has begun to answer it."""
    is_suspect: bool = False
    """An engine may have died of it: it is tried alone, see ``trials.py``."""
    is_held: bool = False
    """It waits for the verdict whether its engine died."""
    has_begun: bool = False
    """Its client has part of the answer, so only a replica of the same lineage can continue it."""
    lineage: int = 0
    """Lineage of the replica that it was last sent to."""
    num_resumes: int = 0
    """How often it continued on another replica because its own failed."""

    @property
    def is_ordinary(self) -> bool:
        """Whether any replica of its model with room can take it."""
        return not self.is_suspect and not self.has_begun

    @property
    def is_queued(self) -> bool:
        """Whether it waits in its model's queue."""
        return self.replica is None and not self.is_held

    def num_output_tokens(self, token_s: float, now_s: float) -> int:
        """Estimate its output so far as in ServerlessLLM (section 6): its running time over the time per token."""
        return int((now_s - self.answered_s) / token_s) if self.is_answered and token_s else 0


@dataclass(frozen=True, slots=True)
class CoreState:
    """All deployed models and all requests that have not ended. Changed by ``RouterCore`` and its parts."""

    models: dict[str, ModelState] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    """Models that are not deployed but have, or had, requests on replicas."""
    on_trial: dict[str, str] = field(default_factory=dict)
    """By replica: the suspect that is tried there."""
    suspects_waiting: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model: the suspects in its queue, and since when each waits."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a start was expected to take, and what it took; times are on the events' clock."""

    model: str
    node: str
    replica: str
    kind: str
    tier: str
    is_warm: bool
    decided_s: float
    expected: Estimate
    actual: Estimate | None = None
    """None until its first answer has begun."""

    def come_true(self, sample: StartSample, prefill_s: float, *, ready_s: float) -> Prediction:
        """Return the prediction with what the start took. Time that no phase accounts for was waiting."""
        took = {
            Term.PROCESS: sample.process_s,
            Term.INIT: sample.init_s,
            Term.WEIGHTS: sample.weights_s,
        }
        queue_s = max(0.0, ready_s - self.decided_s - sum(took.values()))
        return replace(self, actual=Estimate({Term.QUEUE: queue_s, **took, Term.PREFILL: prefill_s}))
