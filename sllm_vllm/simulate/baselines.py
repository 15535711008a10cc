"""Policies to compare the router with: each decides where a model starts. Pure; randomness is seeded.

What they share (queues, keep-alive, eviction of the longest idle) is in ``baseline``; they differ only in ``place``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import combinations

from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.simulate.baseline import Baseline
from sllm_vllm.simulate.hardware import ModelClass
from sllm_vllm.simulate.views import NodeView, Placement, ReplicaPhase, View

MOVED_MAX = 2
"""Most replicas emptied for one start: enough for the largest model of the presets."""


class Availability(Baseline):
    """Chooses the first node with free slots, regardless of where the model is stored."""

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """Tries the nodes in the order of their names."""
        return self.first_fit(sorted(self.nodes.values(), key=lambda node: node.id), spec)


class Serverless(Baseline):
    """Chooses any node with free slots: what ServerlessLLM's evaluation calls the scheduler of serverless platforms."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(f"serverless {seed}")

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """Tries the nodes in random order."""
        nodes = sorted(self.nodes.values(), key=lambda node: node.id)
        self._rng.shuffle(nodes)
        return self.first_fit(nodes, spec)


class RoundRobin(Baseline):
    """Chooses the next node in turn with free slots, as Ray Serve spreads replicas; each node caches what it loaded."""

    def __init__(self) -> None:
        super().__init__()
        self._last = ""

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """Tries the nodes in turn, beginning after the last one chosen."""
        nodes = sorted(self.nodes.values(), key=lambda node: (node.id <= self._last, node.id))
        placement = self.first_fit(nodes, spec)
        if placement is not None:
            self._last = placement.node
        return placement


class Shepherd(Baseline):
    """Chooses the node that loads the model soonest, as ServerlessLLM's evaluation describes Shepherd (NSDI 2023);
    requests in the way there are preempted and begin again elsewhere. A request is preempted at most once, so that all
    end."""

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """The node with the least load time; among equals, the one with the fewest preempted replicas."""
        found: list[tuple[float, int, str, Placement]] = []
        for node in self.nodes.values():
            placement = self._on(node, spec)
            if placement is not None:
                found.append((node.load_s(spec, now_s), len(placement.preempted), node.id, placement))
        return min(found)[3] if found else None

    def _on(self, node: NodeView, spec: ModelSpec) -> Placement | None:
        victims = self.idle_victims(node, spec.accelerators)
        if victims is not None:
            return Placement(node.id, victims)
        if not self.waiting.get(spec.name) or self.requests[self.waiting[spec.name][0][1]].was_preempted:
            return None
        busy = [view for view in self.views.values() if view.node == node.id and self._is_preemptible(view, spec)]
        preempted: list[View] = []
        for view in sorted(busy, key=lambda view: (len(view.ongoing), view.id)):
            preempted.append(view)
            victims = self.idle_victims(node, spec.accelerators - sum(view.num_slots for view in preempted))
            if victims is not None:
                return Placement(node.id, victims, preempted=tuple(view.id for view in preempted))
        return None

    def _is_preemptible(self, view: View, spec: ModelSpec) -> bool:
        is_busy = view.phase is ReplicaPhase.READY and bool(view.ongoing) and view.model != spec.name
        return is_busy and not any(self.requests[request].was_preempted for request in view.ongoing)


class ServerlessLLM(Baseline):
    """Chooses the least estimated startup over all nodes: load queue plus load. Busy replicas in the way are emptied
    first, which takes the load of their model elsewhere, if needed, and a resume of a (tokens so far) + b for each
    request (section 6 of the paper). a, b and the time per token are given, where ServerlessLLM calibrates them."""

    def __init__(self, classes: Mapping[str, ModelClass]) -> None:
        super().__init__()
        self._classes = classes

    def place(self, spec: ModelSpec, now_s: float) -> Placement | None:
        """The plan with the least startup; among equals, the one with the fewest moves."""
        found: list[tuple[float, int, str, Placement]] = []
        for node in self.nodes.values():
            victims = self.idle_victims(node, spec.accelerators)
            if victims is not None:
                found.append((node.load_s(spec, now_s), 0, node.id, Placement(node.id, victims)))
            elif self.waiting.get(spec.name):
                found.extend(self._with_moves(node, spec, now_s))
        return min(found, default=(0.0, 0, "", None))[3]

    def _with_moves(self, node: NodeView, spec: ModelSpec, now_s: float) -> list[tuple[float, int, str, Placement]]:
        """Every way of emptying a few busy replicas of a node."""
        busy = [
            view
            for view in self.views.values()
            if view.node == node.id and view.phase is ReplicaPhase.READY and view.ongoing and not view.num_incoming
        ]
        found = []
        for num_moved in range(1, MOVED_MAX + 1):
            for moved in combinations([view for view in busy if view.model != spec.name], num_moved):
                victims = self.idle_victims(node, spec.accelerators - sum(view.num_slots for view in moved))
                targets = self._targets(moved, now_s)
                if victims is not None and targets is not None:
                    move_s, pairs = targets
                    wait_s = max(move_s, node.load_until_s - now_s)
                    placement = Placement(node.id, victims, moves=pairs)
                    found.append((wait_s + node.weights_s(spec), num_moved, node.id, placement))
        return found

    def _targets(self, moved: tuple[View, ...], now_s: float) -> tuple[float, tuple[tuple[str, str], ...]] | None:
        """Where, on other nodes, the requests of each replica continue, and when the last of them does; None if there
        is no room."""
        free = {node.id: node.num_free for node in self.nodes.values() if node.id != moved[0].node}
        room = {view.id: self.num_room(view) for view in self.views.values()}
        pairs, move_s = [], 0.0
        for source in moved:
            spec = self.specs[source.model]
            others = self.replicas_of(source.model, ReplicaPhase.READY)
            ready = [v.id for v in others if v.node in free and room[v.id] >= len(source.ongoing)]
            nodes = [self.nodes[name] for name, num_free in free.items() if num_free >= spec.accelerators]
            resume_s = sum(self._resume_s(request, now_s) for request in sorted(source.ongoing))
            if ready:
                target, load_s = min(ready), 0.0
                room[target] -= len(source.ongoing)
            elif nodes:
                load_s, target = min((node.load_s(spec, now_s), node.id) for node in nodes)
                free[target] -= spec.accelerators
            else:
                return None
            pairs.append((source.id, target))
            move_s = max(move_s, load_s + resume_s)
        return move_s, tuple(pairs)

    def _resume_s(self, request: str, now_s: float) -> float:
        """Seconds to recompute the tokens so far: the prompt's, plus the running time over the time per token."""
        waiter = self.requests[request]
        kind = self._classes[waiter.model]
        num_answered = 0 if waiter.first_s is None else (now_s - waiter.first_s) / kind.tpot_s
        return kind.prefill_s(waiter.prompt_tokens + round(num_answered))


def baselines(classes: Mapping[str, ModelClass], seed: int) -> dict[str, Callable[[], Baseline]]:
    """All compared policies, by name."""
    return {
        "serverlessllm": lambda: ServerlessLLM(classes),
        "shepherd": Shepherd,
        "serverless": lambda: Serverless(seed),
        "roundrobin_lru": RoundRobin,
        "availability": Availability,
    }
