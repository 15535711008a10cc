"""Deploying, changing and deleting models. Pure; part of ``RouterCore``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.core.events import ModelDeployed
from sllm_vllm.router.core.facts import ModelSpec
from sllm_vllm.router.core.model_state import ModelState, Request
from sllm_vllm.router.core.queues import ModelQueues
from sllm_vllm.router.core.scaling import Scaling


class Deployments:
    """Which models are served, and how. ``requests`` is only read.

    ``reject_deleted``: forgets a waiting request and tells its client that the model was deleted.
    """

    def __init__(
        self,
        scaling: Scaling,
        models: dict[str, ModelState],
        queues: ModelQueues,
        *,
        requests: dict[str, Request],
        strays: set[str],
        reject_deleted: Callable[[str, str], None],
    ) -> None:
        self._scaling = scaling
        self._models = models
        self._queues = queues
        self._requests = requests
        self._strays = strays
        self._reject_deleted = reject_deleted

    def deployed(self, event: ModelDeployed, now_s: float) -> None:
        """Deploy a new model, or change one that is deployed."""
        spec = event.spec
        for node, tier in event.tiers.items():
            if node in self._scaling.cluster.nodes:
                self._scaling.cluster.set_tier(node, spec.name, tier)
        known = self._models.get(spec.name)
        if known is None:
            self._models[spec.name] = ModelState(spec, num_ongoing=self._num_left(spec.name))
        else:
            self._change(known, spec, now_s)
        self._scaling.pin(spec.name)

    def _num_left(self, model: str) -> int:
        """Count the requests still on replicas from before the model was deleted.

        Scans all requests, but only if there may be some.
        """
        if model not in self._strays:
            return 0
        self._strays.discard(model)
        return sum(one.replica is not None and one.facts.model == model for one in self._requests.values())

    def _change(self, known: ModelState, spec: ModelSpec, now_s: float) -> None:
        is_changed = spec.generation != known.spec.generation
        old_nbytes, nbytes = known.spec.nbytes, spec.nbytes
        # If nothing relevant changed, keep the known size: it may come from a checkpoint, which knows it better.
        nbytes = (nbytes or old_nbytes) if is_changed else (old_nbytes or nbytes)
        known.spec = replace(spec, nbytes=nbytes)
        known.num_kept = self._queues.waiting(spec.name)
        known.back_off.succeeded()  # the cause may have been fixed outside the router
        if is_changed:
            self._scaling.replace_generation(known, now_s)
        self._scaling.reset_idle(spec.name, now_s)

    def deleted(self, model: str, now_s: float) -> None:
        """Reject its waiting requests, call off its starts, and drain its replicas."""
        if model not in self._models:
            return
        while (facts := self._queues.pop(model)) is not None:
            self._reject_deleted(facts.id, model)
        for pending in self._scaling.pending.of_model(model):
            self._scaling.call_off(pending, now_s)
        if self._models.pop(model).num_ongoing:
            self._strays.add(model)
        self._scaling.forget_model(model)
        for replica in self._scaling.cluster.replicas_of(model):
            if replica.state is ReplicaState.ORDERED:
                self._scaling.stop(replica.id, "its model was deleted", now_s)
            self._scaling.drain(replica.id, now_s)
