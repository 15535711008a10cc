"""How long the router's core thinks: the real core in the simulated world, its time alone by a real clock."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from sllm_vllm.router.core.events import Event, ModelDeployed, NodeJoined, NodeReported
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.simulate.hardware import Cluster
from sllm_vllm.simulate.metrics import percentile
from sllm_vllm.simulate.policy import Order, Policy
from sllm_vllm.simulate.workload import draw_requests
from sllm_vllm.simulate.world import World

NUM_MODELS = (10, 100, 1_000, 10_000)
GROWTH_RATE = 200.0
"""Requests a second while the number of models grows: ten models can serve as many."""
GROWTH_REPLICAS = 16
SET_UP = {ModelDeployed.__name__, NodeJoined.__name__, NodeReported.__name__}
"""Not counted as decisions."""


class Timed:
    """A policy that notes how long another one takes for each event."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """By the kind of event."""

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        """As ``Policy`` says."""
        begin_s = time.perf_counter()
        orders = self.policy.handle(event, now_s)
        self.seconds[type(event).__name__].append(time.perf_counter() - begin_s)
        return orders


@dataclass(frozen=True, slots=True)
class Decisions:
    """How long events took, by their kind, in ascending order; those that set up are apart."""

    seconds: dict[str, list[float]]
    set_up: dict[str, list[float]]

    @property
    def num(self) -> int:
        """Events that asked for a decision."""
        return sum(len(values) for values in self.seconds.values())

    @property
    def mean_s(self) -> float:
        """Of a decision, whatever it was about."""
        return sum(sum(values) for values in self.seconds.values()) / max(1, self.num)

    def rows(self) -> list[dict[str, object]]:
        """A line for each kind of event, for people; microseconds."""
        return [
            {
                "event": kind,
                "count": len(values),
                "mean us": f"{fmean(values) * 1e6:.0f}",
                "P50": f"{percentile(values, 0.5) * 1e6:.0f}",
                "P99": f"{percentile(values, 0.99) * 1e6:.0f}",
                "most": f"{values[-1] * 1e6:.0f}",
            }
            for kind, values in sorted({**self.seconds, **self.set_up}.items())
        ]


def measure(cluster: Cluster, num_requests: int, *, seed: int) -> Decisions:
    """Simulate the router's core alone.

    The garbage collector is off meanwhile: at the size of ``big`` it pauses for half a second, for the world's objects.
    """
    timed = Timed(RouterCore())
    requests = draw_requests(cluster.traffic, list(cluster.classes()), num_requests, seed=seed)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        World(cluster, timed, seed=seed).run(requests)
    finally:
        if was_enabled:
            gc.enable()
    ordered = {kind: sorted(values) for kind, values in timed.seconds.items()}
    return Decisions(
        {kind: values for kind, values in ordered.items() if kind not in SET_UP},
        {kind: values for kind, values in ordered.items() if kind in SET_UP},
    )


def with_models(cluster: Cluster, num_models: int) -> Cluster:
    """The same nodes and about the same requests, with so many models of its first class, all asked equally."""
    return replace(
        cluster,
        models=((cluster.models[0][0], num_models),),
        traffic=replace(cluster.traffic, rate=min(cluster.traffic.rate, GROWTH_RATE), exponent=0.0),
        serving=replace(cluster.serving, max_replicas=GROWTH_REPLICAS),
    )


def growth(cluster: Cluster, num_requests: int, *, seed: int) -> dict[int, Decisions]:
    """Decisions by the number of models."""
    return {num: measure(with_models(cluster, num), num_requests, seed=seed) for num in NUM_MODELS}
