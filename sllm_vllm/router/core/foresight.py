"""Preparing for requests that are likely: keep-alive of idle replicas, prefetching and copying checkpoints. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllm_vllm.router.core.alarms import Alarms
from sllm_vllm.router.core.cluster import Cluster, Replica
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import CopyCheckpoint, PrefetchModel
from sllm_vllm.router.core.facts import CopyLimits, RouterLimits, Tier
from sllm_vllm.router.core.keep_alive import keep_alive_s
from sllm_vllm.router.core.model_state import ModelState

HOT_SHARE = 0.5
"""A model is hot if its replicas have this share of their target number of requests."""
LOOK_S = 5.0
MODELS_MAX = 64
"""Models examined per look; the others wait for the next look."""


@dataclass(frozen=True, slots=True)
class _Copying:
    source: str
    until_s: float


class Copies:
    """Decides which checkpoints are copied to more nodes before they are needed there.

    A model whose replicas have half of their target number of requests is likely to get another replica soon. By then
    its checkpoint should be on one node more than the model has replicas; otherwise that start waits for remote
    storage. A copy that has not appeared after ``copy_s_max`` counts as failed.
    """

    def __init__(self, cluster: Cluster, models: Mapping[str, ModelState], limits: CopyLimits) -> None:
        self._cluster = cluster
        self._models = models
        self._limits = limits
        self._asked: dict[str, None] = {}
        """Models that got a request since they were last looked at."""
        self._copying: dict[tuple[str, str], _Copying] = {}
        """By model and target node."""
        self._next_s = 0.0

    def asked(self, model: str) -> None:
        """Note that a request for the model arrived."""
        if self._limits.holders_max > 1 and len(self._cluster.nodes) > 1:
            self._asked[model] = None

    def due(self, now_s: float) -> list[CopyCheckpoint]:
        """Return the copies to begin: at most ``at_once_max`` under way, and one at a time from and to each node."""
        if now_s < self._next_s or not (self._asked or self._copying):
            return []
        self._next_s = now_s + LOOK_S
        self._forget_ended(now_s)
        made = []
        for model in list(self._asked)[:MODELS_MAX]:
            del self._asked[model]
            if len(self._copying) < self._limits.at_once_max and (copy := self._copy_of(model)) is not None:
                self._copying[model, copy.node] = _Copying(copy.source, now_s + self._limits.copy_s_max)
                made.append(copy)
        return made

    def _forget_ended(self, now_s: float) -> None:
        """Forget copies that have arrived, have timed out, or have lost their source or target node."""
        nodes = self._cluster.nodes
        for (model, node), copying in list(self._copying.items()):
            is_there = node in nodes and model in nodes[node].tiers
            if is_there or node not in nodes or copying.source not in nodes or now_s >= copying.until_s:
                del self._copying[model, node]

    def _copy_of(self, model: str) -> CopyCheckpoint | None:
        state = self._models.get(model)
        if state is None:
            return None
        spec, num_replicas = state.spec, len(self._cluster.replicas_of(model))
        if not num_replicas or state.num_ongoing < HOT_SHARE * num_replicas * spec.target_ongoing:
            return None
        nodes = self._cluster.nodes
        holders = {name for name, node in nodes.items() if model in node.tiers}
        receiving = {node for of, node in self._copying if of == model}
        wanted = min(self._limits.holders_max, num_replicas + 1)
        if len(holders) + len(receiving) >= wanted:
            return None
        busy = {node for _, node in self._copying} | {one.source for one in self._copying.values()}
        sources = sorted(holders - busy)
        targets = [
            node
            for name, node in nodes.items()
            if name not in holders | busy and not node.is_cordoned and node.num_slots >= spec.accelerators
        ]
        if not sources or not targets:
            return None
        best = min(targets, key=lambda node: (-node.num_free, len(node.tiers), node.id))
        return CopyCheckpoint(model, sources[0], best.id)


class Foresight:
    """When an idle replica may end, and when a model without replicas is prefetched. ``Scaling`` owns it and acts."""

    def __init__(
        self, cluster: Cluster, estimator: Estimator, models: Mapping[str, ModelState], *, limits: RouterLimits
    ) -> None:
        self._cluster = cluster
        self._estimator = estimator
        self._models = models
        self._lead_s = limits.scaling.prefetch_s
        self._copies = Copies(cluster, models, limits.copies)
        self._idle = Alarms()
        """By replica: the end of its keep-alive."""
        self._prefetches = Alarms()
        """By model: when to prefetch its checkpoint for the next burst."""

    def became_idle(self, replica: Replica, state: ModelState) -> None:
        """Set the keep-alive of a replica that became idle: the model's own, or as long as it is worth its slots."""
        assert replica.idle_since_s is not None
        ttl_s = state.spec.keep_alive_s
        if ttl_s is None:
            share = replica.num_slots / max(1, self._cluster.num_slots(replica.node))
            startup_s = self._estimator.startup_s(state.spec)
            ttl_s = keep_alive_s(state.arrivals, startup_s=startup_s, share=share)
        self._idle.set(replica.id, replica.idle_since_s + ttl_s)

    def idle_too_long(self, now_s: float) -> list[Replica]:
        """Return the replicas whose keep-alive is over, each once."""
        found = [self._cluster.replicas.get(name) for name in self._idle.due(now_s)]
        return [replica for replica in found if replica is not None and replica.idle_since_s is not None]

    def arrived(self, state: ModelState, now_s: float) -> None:
        """Note that a request of the model arrived, and schedule the prefetch for the next burst."""
        self._copies.asked(state.spec.name)
        together_s = max(self._estimator.startup_s(state.spec), state.service_s)
        state.arrivals.note(now_s, together_s=together_s)
        next_s = state.arrivals.next_burst_s(0.5)
        if next_s is not None and next_s > self._lead_s:
            self._prefetches.set(state.spec.name, now_s + next_s - self._lead_s)
        else:
            self._prefetches.discard(state.spec.name)

    def errands(self, now_s: float) -> list[PrefetchModel | CopyCheckpoint]:
        """Return the checkpoints to prefetch, of models expected soon that have no replica, and those to copy."""
        models = [one for one in self._prefetches.due(now_s) if one in self._models]
        sleeping = [model for model in models if not self._cluster.replicas_of(model)]
        places = [(model, node) for model in sleeping for node in self._cluster.candidates(model, 0, 1)]
        read = [PrefetchModel(*place) for place in places if self._cluster.tier(place[1], place[0]) is not Tier.HOST]
        return [*read, *self._copies.due(now_s)]

    def forget_model(self, model: str) -> None:
        """Forget a deleted model."""
        self._prefetches.discard(model)
