"""Records of a simulated run: each request's outcome, and counts. Filled by ``World``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sllm_vllm.simulate.workload import SimulatedRequest


class End(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    BROKEN = "broken"
    """Its engine ended after its answer had begun."""
    REJECTED = "rejected"
    LEFT = "left"


@dataclass(slots=True)
class RequestOutcome:
    """A request's outcome. ``first_s``: the time of its first token that was not discarded."""

    request: SimulatedRequest
    dispatched_s: float | None = None
    """The time of its last dispatch."""
    first_s: float | None = None
    ended_s: float | None = None
    end: End | None = None
    why: str = ""
    replica: str | None = None
    """The replica it is on, or was on last."""
    ordered_s: float = 0.0
    """When the replica that serves it was ordered."""
    ready_s: float = 0.0
    """When that replica was ready."""
    is_cold: bool = False
    """Whether a replica that served it became ready after its arrival."""
    num_dispatches: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to first token; None if there was none."""
        return None if self.first_s is None else self.first_s - self.request.at_s

    @property
    def startup_s(self) -> float | None:
        """Seconds from arrival until its last dispatch to a ready replica; None if it was never dispatched."""
        return None if self.dispatched_s is None else self.dispatched_s - self.request.at_s

    @property
    def waits_s(self) -> tuple[float, float, float]:
        """The parts of ``startup_s``: until a start was ordered, until that replica was ready, and until it had
        room."""
        at_s, dispatched_s = self.request.at_s, self.dispatched_s
        assert dispatched_s is not None, f"{self.request.id} was never sent"
        ordered_s = min(max(at_s, self.ordered_s), dispatched_s)
        ready_s = min(max(ordered_s, self.ready_s), dispatched_s)
        return ordered_s - at_s, ready_s - ordered_s, dispatched_s - ready_s

    @property
    def total_s(self) -> float | None:
        """Seconds from arrival to the end of its answer."""
        return None if self.ended_s is None else self.ended_s - self.request.at_s


@dataclass(slots=True)
class Run:
    """The result of one policy on one list of requests."""

    outcomes: dict[str, RequestOutcome] = field(default_factory=dict)
    accelerator_s: float = 0.0
    """Sum over replicas of slots held times seconds, from the order on."""
    num_starts: int = 0
    num_start_failures: int = 0
    num_crashes: int = 0
    num_losses: int = 0
    num_moves: int = 0
    num_recomputed_tokens: int = 0
    """Tokens recomputed by the targets of moves."""
    num_preemptions: int = 0
    num_prefetches: int = 0
    end_s: float = 0.0

    def validate(self, num_requests: int) -> None:
        """Assert that every request arrived and ended in some way."""
        assert len(self.outcomes) == num_requests, f"{len(self.outcomes)} of {num_requests} requests arrived"
        lost = [name for name, outcome in self.outcomes.items() if outcome.end is None]
        assert not lost, f"{len(lost)} requests never ended, the first of them {lost[0]}"
