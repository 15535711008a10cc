"""Counters of what the router has done since it started, for ``/metrics``. Owned by the controller."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from sllm_vllm.metrics import REQUEST_BUCKETS, RouterMetric
from sllm_vllm.router.core.events import (
    Action,
    Event,
    ModelDeleted,
    ModelDeployed,
    RejectRequest,
    ReplicaEnded,
    ReplicaReady,
    StartReplica,
)
from sllm_vllm.router.core.facts import StartSample
from sllm_vllm.router.gate import MoveReport, Outcome, Ticket
from sllm_vllm.router.http.client_state import ClientCounts

START_KINDS = ("warm", "cold", "unknown")


class Histogram:
    """How many values fell into each bucket; the last bucket is for values above all bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def observe(histograms: dict[str, Histogram], model: str, value_s: float) -> None:
    """Count a value in the model's histogram, making one if needed."""
    histograms.setdefault(model, Histogram(REQUEST_BUCKETS)).observe(value_s)


class Counts:
    """All counters. Those of a model are dropped when it is deleted; its requests that end later count for model ''."""

    def __init__(self) -> None:
        self.starts: Counter[str] = Counter()
        """Starts by outcome: ready, failed, called_off."""
        self.start_s = {kind: Histogram(RouterMetric.START_SECONDS.value.buckets) for kind in START_KINDS}
        """Startup times, from the order until the replica was ready, by kind of start."""
        self.requests: Counter[tuple[str, str]] = Counter()
        """Requests by model and outcome."""
        self.tokens: Counter[tuple[str, str]] = Counter()
        """Tokens by model and kind, prompt or output, as far as engines reported them."""
        self.ttft_s: dict[str, Histogram] = {}
        self.duration_s: dict[str, Histogram] = {}
        self.queue_wait_s: dict[str, Histogram] = {}
        """The three above are by model: seconds from arrival to first byte and to the end, and in the queue."""
        self.clients = ClientCounts()
        self.rejections: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        """Migrations by outcome: moved, not_moved."""
        self.held_s = Histogram(RouterMetric.MOVE_HELD_SECONDS.value.buckets)
        self.num_filled = 0
        """Tokens that migration targets recomputed in their rounds."""
        self._models: set[str] = set()
        self._ordered_s: dict[str, float] = {}
        """When each replica that is still starting was ordered."""

    def note(self, event: Event, actions: Iterable[Action], now_s: float) -> None:
        """Count an event of the core, and the actions that followed."""
        match event:
            case ModelDeployed():
                self._models.add(event.spec.name)
            case ModelDeleted():
                self._forget(event.model)
            case ReplicaReady():
                self._started(event.replica, event.sample, now_s)
            case ReplicaEnded() if self._ordered_s.pop(event.replica, None) is not None:
                self.starts["failed" if event.is_fault else "called_off"] += 1
        for action in actions:
            if isinstance(action, StartReplica):
                self._ordered_s[action.replica] = now_s
            elif isinstance(action, RejectRequest):
                self.rejections[action.why.name.lower()] += 1

    def note_outcome(self, ticket: Ticket, outcome: Outcome) -> None:
        """Count a request that ended after it had been sent to a replica."""
        model = ticket.model if ticket.model in self._models else ""
        self.requests[model, outcome.how] += 1
        self.tokens[model, "prompt"] += outcome.prompt_tokens or 0
        self.tokens[model, "output"] += outcome.output_tokens or 0
        observe(self.queue_wait_s, model, outcome.waited_s)
        observe(self.duration_s, model, outcome.waited_s + outcome.seconds)
        if outcome.first_byte_s is not None:
            observe(self.ttft_s, model, outcome.waited_s + outcome.first_byte_s)

    def note_move(self, report: MoveReport, *, outcome: str) -> None:
        """Count a migration that ended."""
        self.moves[outcome] += 1
        self.num_filled += report.num_filled
        if outcome == "moved":
            self.held_s.observe(report.held_s)

    def _started(self, replica: str, sample: StartSample | None, now_s: float) -> None:
        ordered_s = self._ordered_s.pop(replica, None)
        if ordered_s is None:
            return
        self.starts["ready"] += 1
        kind = "unknown" if sample is None else "warm" if sample.is_warm else "cold"
        self.start_s[kind].observe(now_s - ordered_s)

    def _forget(self, model: str) -> None:
        self._models.discard(model)
        for counter in (self.requests, self.tokens):
            for key in [key for key in counter if key[0] == model]:
                del counter[key]
        for histograms in (self.ttft_s, self.duration_s, self.queue_wait_s):
            histograms.pop(model, None)
