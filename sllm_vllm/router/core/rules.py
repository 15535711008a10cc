"""What a start may take from other models, and what that costs: evictions, migrations, relocations. Pure."""

from __future__ import annotations

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.facts import ModelSpec, RouterLimits
from sllm_vllm.router.core.keep_alive import keep_value_s
from sllm_vllm.router.core.model_state import CoreState


class RuleBook:
    """The rules by which placement chooses. Only reads the core's state.

    ``nodes_max``: nodes examined per kind of plan. ``may_move``: whether requests can be moved at all.
    """

    def __init__(self, limits: RouterLimits, core_state: CoreState, *, cluster: Cluster, estimator: Estimator) -> None:
        self.cluster = cluster
        self.estimator = estimator
        self.nodes_max = limits.scaling.plans_max
        self.may_move = limits.moves.is_on
        self._moves_max = limits.moves.moves_max
        self._models = core_state.models
        self._requests = core_state.requests

    def is_spare(self, replica: Replica) -> bool:
        """Whether the replica may end without its model falling below its minimum; an old generation always may."""
        state = self._models.get(replica.model)
        if state is None or replica.generation != state.spec.generation:
            return True
        if state.spec.min_replicas == 0:
            return True
        ready = self.cluster.replicas_of(replica.model, ReplicaState.READY)
        return sum(one.generation == replica.generation for one in ready) > state.spec.min_replicas

    def keep_value_s(self, replica: Replica, now_s: float) -> float:
        """Return the startup time that stopping an idle replica is expected to cost later."""
        state = self._models.get(replica.model)
        if state is None:
            return 0.0
        return keep_value_s(state.arrivals, startup_s=self.estimator.startup_s(state.spec), now_s=now_s)

    def may_empty(self, replica: Replica, now_s: float) -> bool:
        """Whether all requests of a busy replica could be moved away.

        It must have served for at least its startup time, so that two models do not keep displacing each other; no
        request may be moving to it; and the limit of migrations at once must cover all its requests.
        """
        state = self._models.get(replica.model)
        if state is None or replica.ready_s is None or not replica.is_movable:
            return False
        if replica.generation != state.spec.generation or len(replica.ongoing) > self._moves_max:
            return False
        if now_s - replica.ready_s < self.estimator.startup_s(state.spec):
            return False
        requests = [self._requests[name] for name in replica.ongoing]
        return all(one.replica == replica.id and one.target is None and not one.stays for one in requests)

    def resume_s(self, request_id: str, now_s: float) -> float:
        """Return how long until a request that is moved resumes elsewhere."""
        request = self._requests[request_id]
        state, source = self._models[request.facts.model], self.cluster.replicas[request.replica or ""]
        num_tokens = request.facts.prompt_tokens + request.num_output_tokens(state.token_s, now_s)
        return self.estimator.resume_s(request.facts.model, source.node, num_tokens)

    def room(self, replica: Replica) -> int:
        """Return how many more requests the replica could take over."""
        state = self._models.get(replica.model)
        if state is None or not replica.is_movable or replica.generation != state.spec.generation:
            return 0
        return state.spec.ongoing_max - len(replica.ongoing)

    def spec_of(self, replica: Replica) -> ModelSpec | None:
        """Return the spec of the replica's model if a replacement may be started elsewhere; else None."""
        state = self._models.get(replica.model)
        is_coming = bool(self.cluster.replicas_of(replica.model, ReplicaState.ORDERED))
        return None if state is None or is_coming or state.back_off.num_failures else state.spec
