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
FAILURES_MAX = 3
"""Failed starts in a row after which waiting requests are told, and new ones refused until the next attempt."""
SERVICE_SHARE = 0.2
"""Weight of the newest request in the running mean of how long one takes."""


@dataclass(slots=True)
class BackOff:
    """Failed starts of a model in a row: each doubles the pause before the next attempt."""

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
        """It starts after all."""
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

    def served(self, seconds: float) -> None:
        """One request kept its place for so long."""
        share = SERVICE_SHARE if self.service_s else 1.0
        self.service_s += share * (max(0.0, seconds) - self.service_s)


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
