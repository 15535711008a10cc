"""What the core remembers about one model and one request. Pure; owned by ``RouterCore``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sllm_vllm.router.core.autoscale import AutoscaleState
from sllm_vllm.router.core.facts import Estimate, ModelSpec, RequestFacts, StartSample, Term
from sllm_vllm.router.core.keep_alive import Arrivals

BACK_OFF_S = 1.0
BACK_OFF_S_MAX = 60.0
_DOUBLINGS_MAX = 16
"""More would pass the maximum anyway, and after a thousand the range of a float."""
STEADY_S = 30.0
"""A replica that has been ready for so long works: the failures before it are forgotten."""
FAILURES_MAX = 3
"""Failed starts in a row after which waiting requests are told, and new ones refused until the next attempt."""
SERVICE_SHARE = 0.2
"""Weight of the newest request in the running mean of how long one takes."""


@dataclass(slots=True)
class BackOff:
    """Failed starts of a model in a row: each doubles the pause before the next attempt.

    A replica that ends by its own fault before it was ready for ``STEADY_S`` is a failed start, too.
    """

    num_failures: int = 0
    until_s: float = 0.0
    reason: str = ""

    def failed(self, reason: str, now_s: float) -> None:
        """One more; starts that fail beside it, in the pause that it makes, are the same failure."""
        self.reason = reason
        if self.is_resting(now_s):
            return
        self.num_failures += 1
        self.until_s = now_s + min(BACK_OFF_S_MAX, BACK_OFF_S * 2.0 ** min(self.num_failures - 1, _DOUBLINGS_MAX))

    def succeeded(self) -> None:
        """A replica of it works, or it is to be tried at once."""
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
    """Requests that replicas have now."""
    num_kept: int = 0
    """Requests that waited when it was deployed again: its ``queue_max`` may be less now, and they go on."""
    service_s: float = 0.0
    """Running mean of how long a request keeps its place; 0 as long as none ended."""
    token_s: float = 0.0
    """Running mean of the time from one output token to the next; 0 as long as nobody told."""

    def served(self, seconds: float) -> None:
        """One request kept its place for so long."""
        share = SERVICE_SHARE if self.service_s else 1.0
        self.service_s += share * (max(0.0, seconds) - self.service_s)

    def generated(self, num_tokens: int, seconds: float) -> None:
        """An answer of so many tokens took so long after its first byte."""
        if num_tokens > 1 and seconds > 0:
            share = SERVICE_SHARE if self.token_s else 1.0
            self.token_s += share * (seconds / (num_tokens - 1) - self.token_s)


@dataclass(slots=True)
class Request:
    """One request, from its arrival to its end. It waits as long as it has no replica."""

    facts: RequestFacts
    arrived_s: float
    replica: str | None = None
    dispatched_s: float = 0.0
    away_s: float = 0.0
    """That it was with replicas that failed it; no time of waiting."""
    attempt: int = 0
    was_alone: bool = False
    """Nobody else was on its replica when it was sent there, so its first token tells of the prefill."""
    is_answered: bool = False
    """Its first byte was seen."""
    answered_s: float = 0.0
    """When that was."""
    target: str | None = None
    """The replica that it is moving to; it has a place there, too."""
    num_move_failures: int = 0
    move_after_s: float = 0.0
    """Before that it is not moved again."""
    stays: bool = False
    """It can't be moved."""
    is_proven: bool = False
    """The replica that it is on has answered it, in part."""
    is_suspect: bool = False
    """An engine may have died of it: it is sent only to a replica that has no other request."""
    is_held: bool = False
    """It waits until it is known whether its engine died."""
    has_begun: bool = False
    """Its client has a part of the answer, so it can only go on on a replica of the same lineage."""
    lineage: int = 0
    """Of the replica that it was sent to last."""
    num_resumes: int = 0
    """How often it had to go on elsewhere because an engine died."""

    @property
    def is_ordinary(self) -> bool:
        """Whether any replica of its model with room will do."""
        return not self.is_suspect and not self.has_begun

    @property
    def is_queued(self) -> bool:
        """Whether it waits for a replica."""
        return self.replica is None and not self.is_held

    def num_output_tokens(self, token_s: float, now_s: float) -> int:
        """What it has generated by now, guessed as in ServerlessLLM (section 6): its time over the time of a token."""
        return int((now_s - self.answered_s) / token_s) if self.is_answered and token_s else 0


@dataclass(frozen=True, slots=True)
class Picture:
    """All models that are deployed, and all requests that were not answered. ``RouterCore`` changes both."""

    models: dict[str, ModelState] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    """Models that are not deployed and have, or had, requests on replicas."""
    on_trial: dict[str, str] = field(default_factory=dict)
    """By replica: the suspect that is tried there."""
    suspects_waiting: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model: suspects in the queue, and since when."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a start was expected to take, and then took; times are the events' clock."""

    model: str
    node: str
    replica: str
    kind: str
    tier: str
    is_warm: bool
    decided_s: float
    expected: Estimate
    actual: Estimate | None = None
    """None until its first answer began."""

    def come_true(self, sample: StartSample, prefill_s: float, *, ready_s: float) -> Prediction:
        """It, with what its start took; what no phase accounts for was waiting."""
        took = {
            Term.PROCESS: sample.process_s,
            Term.INIT: sample.init_s,
            Term.WEIGHTS: sample.weights_s,
        }
        queue_s = max(0.0, ready_s - self.decided_s - sum(took.values()))
        return replace(self, actual=Estimate({Term.QUEUE: queue_s, **took, Term.PREFILL: prefill_s}))
