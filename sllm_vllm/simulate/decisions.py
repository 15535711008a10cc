"""Measures the decision time of the real router core in the simulated world, without the simulation's own time."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import fmean

from sllm_vllm.router.core.events import Event, ModelDeployed, NodeJoined, NodeReported, RequestArrived
from sllm_vllm.router.core.facts import RouterLimits
from sllm_vllm.router.core.router import RouterCore
from sllm_vllm.simulate.hardware import HardwareCluster
from sllm_vllm.simulate.metrics import percentile
from sllm_vllm.simulate.policy import Order
from sllm_vllm.simulate.workload import draw_requests
from sllm_vllm.simulate.world import World

NUM_MODELS = (100, 1_000, 10_000, 30_000)
NUM_NODES = (10, 100, 1_000)
GROWTH_RATE = 200.0
"""Requests a second while the number of models grows: a hundred models can serve that many."""
GROWTH_REPLICAS = 16
CROWDING = 8.0
"""Load of a crowded cluster, as a multiple of the preset's: more than its slots can serve at once."""
SET_UP = {ModelDeployed.__name__, NodeJoined.__name__, NodeReported.__name__}
"""Not counted as decisions."""


class Recorded:
    """The core as a policy that records every event."""

    def __init__(self, core: RouterCore) -> None:
        self.core = core
        self.events: list[tuple[float, Event]] = []
        self.num_waiting_max = 0

    def handle(self, event: Event, now_s: float) -> Sequence[Order]:
        """See ``Policy``."""
        self.events.append((now_s, event))
        orders = self.core.handle(event, now_s)
        self.num_waiting_max = max(self.num_waiting_max, len(self.core.queues))
        return orders


@dataclass(frozen=True, slots=True)
class Decisions:
    """Wall-clock seconds of each event, by kind, ascending; set-up events are kept apart."""

    seconds: dict[str, list[float]]
    set_up: dict[str, list[float]]
    computed_s: float
    """Processor time of all events from the first request on."""
    num_waiting_max: int = 0
    """The most requests that waited at once."""

    @property
    def num(self) -> int:
        """Events that asked for a decision."""
        return sum(len(values) for values in self.seconds.values())

    @property
    def mean_s(self) -> float:
        """Mean seconds of a decision of any kind; includes the time of nodes' reports, but does not count them as
        decisions."""
        return self.computed_s / max(1, self.num)

    def rows(self) -> list[dict[str, object]]:
        """A table row for each kind of event, in microseconds."""
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

    def record(self) -> dict[str, object]:
        """The same as a JSON record, in seconds."""
        return {
            "decisions": self.num,
            "mean_s": self.mean_s,
            "decisions_per_s": 1 / self.mean_s,
            "num_waiting_max": self.num_waiting_max,
            "mean_s_by_event": {kind: fmean(values) for kind, values in sorted(self.seconds.items())},
        }


def measure(cluster: HardwareCluster, num_requests: int, *, seed: int) -> Decisions:
    """Simulate the router's core and replay its events on a second core, which is timed. No request is refused
    because too many wait.

    The garbage collector is off meanwhile: at the size of ``big`` it would pause for half a second for the world's
    objects.
    """
    limits = RouterLimits(waiting_max=num_requests)
    recorded = Recorded(RouterCore(limits))
    requests = draw_requests(cluster.traffic, list(cluster.classes()), num_requests, seed=seed)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        World(cluster, recorded, seed=seed).run(requests)
        return _replay(recorded, RouterCore(limits))
    finally:
        if was_enabled:
            gc.enable()


def _replay(recorded: Recorded, core: RouterCore) -> Decisions:
    """Time a core on recorded events. The processor's clock is read only at the ends, since reading it takes longer
    than a decision on a virtual machine."""
    num_before = next((n for n, (_, event) in enumerate(recorded.events) if isinstance(event, RequestArrived)), 0)
    seconds: dict[str, list[float]] = defaultdict(list)
    computed_s = 0.0
    for part in (recorded.events[:num_before], recorded.events[num_before:]):
        begin_s = time.thread_time()
        for now_s, event in part:
            asked_s = time.perf_counter()
            core.handle(event, now_s)
            seconds[type(event).__name__].append(time.perf_counter() - asked_s)
        computed_s = time.thread_time() - begin_s
    ordered = {kind: sorted(values) for kind, values in seconds.items()}
    return Decisions(
        {kind: values for kind, values in ordered.items() if kind not in SET_UP},
        {kind: values for kind, values in ordered.items() if kind in SET_UP},
        computed_s,
        recorded.num_waiting_max,
    )


def crowded(cluster: HardwareCluster) -> HardwareCluster:
    """The same cluster with more traffic than it can serve: queues grow, and models wait for slots."""
    traffic = replace(cluster.traffic, rate=CROWDING * cluster.traffic.rate)
    return replace(cluster, traffic=traffic, serving=replace(cluster.serving, queue_s_max=1e6, queue_max=1_000_000))


def with_models(cluster: HardwareCluster, num_models: int) -> HardwareCluster:
    """The same nodes and about the same traffic, with ``num_models`` models of the first class, all equally popular."""
    return replace(
        cluster,
        models=((cluster.models[0][0], num_models),),
        traffic=replace(cluster.traffic, rate=min(cluster.traffic.rate, GROWTH_RATE), exponent=0.0),
        serving=replace(cluster.serving, max_replicas=GROWTH_REPLICAS),
    )


def with_nodes(cluster: HardwareCluster, num_nodes: int) -> HardwareCluster:
    """``num_nodes`` nodes, with the same traffic and number of models for each node."""
    share = num_nodes / cluster.num_nodes
    models = tuple((kind, max(1, round(count * share))) for kind, count in cluster.models)
    traffic = replace(cluster.traffic, rate=cluster.traffic.rate * share)
    return replace(cluster, num_nodes=num_nodes, models=models, traffic=traffic)


def growth_rows(grown: Mapping[int, Decisions], what: str) -> list[dict[str, object]]:
    """A table row for each size: how much slower than the first size, and how much the logarithm of the size grew."""
    first = min(grown)
    return [
        {
            what: size,
            "decisions": found.num,
            "mean us": f"{found.mean_s * 1e6:.0f}",
            "a second": f"{1 / found.mean_s:.0f}",
            "slower": f"{found.mean_s / grown[first].mean_s:.2f}",
            "logarithm": f"{log(size) / log(first):.2f}",
        }
        for size, found in grown.items()
    ]
