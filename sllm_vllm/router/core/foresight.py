"""Preparing for requests that are likely: keep-alive of idle replicas, prefetching and copying checkpoints. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sllm_vllm.router.core.alarms import Alarms
from sllm_vllm.router.core.cluster import Cluster, Replica
from sllm_vllm.router.core.copies import Copies
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import CopyCheckpoint, PrefetchModel
from sllm_vllm.router.core.facts import Tier
from sllm_vllm.router.core.keep_alive import keep_alive_s
from sllm_vllm.router.core.limits import RouterLimits
from sllm_vllm.router.core.model_state import ModelState


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
