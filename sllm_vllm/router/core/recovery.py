"""Taking over what an earlier process of the router left running: replicas and the requests on them. Pure.

Part of ``RouterCore``. The agents know which replicas run, and the processes that stream requests know which requests
run; here both are joined again. Nothing that runs is ended because its router restarted.
"""

from __future__ import annotations

from collections.abc import Iterable

from sllm_vllm.router.core.cluster import Replica, ReplicaState
from sllm_vllm.router.core.facts import FoundReplica, RequestFacts
from sllm_vllm.router.core.model_state import Picture, Request
from sllm_vllm.router.core.scaling import Scaling


class Recovery:
    """Takes over replicas and requests as if they had been ordered here. ``touched`` gets their models."""

    def __init__(self, scaling: Scaling, picture: Picture, *, touched: dict[str, None]) -> None:
        self._scaling = scaling
        self._cluster = scaling.cluster
        self._models = picture.models
        self._requests = picture.requests
        self._strays = picture.strays
        self._touched = touched

    def replicas_found(self, found: Iterable[FoundReplica], node: str, now_s: float) -> None:
        """Take over the replicas found on a node that just joined; outdated ones are drained or stopped."""
        for one in found:
            if one.id not in self._cluster.replicas and one.num_slots <= self._cluster.free_slots(node):
                self._replica_found(one, node, now_s)

    def request_found(self, facts: RequestFacts, replica_id: str, now_s: float) -> None:
        """Take over a request that is being streamed from a replica.

        A request that is known already, or whose replica is gone, is ignored.
        """
        replica = self._cluster.replicas.get(replica_id)
        if replica is None or facts.id in self._requests:
            return
        if replica.state is ReplicaState.READY:
            self._take_in(facts, replica, now_s)
        elif replica.state is ReplicaState.DRAINING:
            self._cluster.set_state(replica_id, ReplicaState.READY, now_s)
            self._take_in(facts, replica, now_s)
            self._cluster.set_state(replica_id, ReplicaState.DRAINING, now_s)
            self._scaling.leaving[replica.model] = None

    def _replica_found(self, found: FoundReplica, node: str, now_s: float) -> None:
        replica = Replica(
            id=found.id,
            model=found.model,
            node=node,
            generation=found.generation,
            lineage=found.lineage,
            num_slots=found.num_slots,
            state_since_s=now_s,
            ordered_s=now_s,
            ready_at_s=now_s,
        )
        self._cluster.add_replica(replica)
        self._touched[found.model] = None
        state = self._models.get(found.model)
        is_current = state is not None and state.spec.generation == found.generation
        if found.is_stopping:
            self._cluster.set_state(found.id, ReplicaState.STOPPING, now_s)
        elif found.is_ready:
            self._cluster.set_state(found.id, ReplicaState.READY, now_s)
            for facts in found.requests:
                if facts.id not in self._requests:
                    self._take_in(facts, replica, now_s)
            if not is_current:
                self._scaling.drain(found.id, now_s)
            elif not replica.ongoing:
                self._scaling.became_idle(replica, now_s)
            self._scaling.pin(found.model)
        elif not is_current:
            self._scaling.stop(found.id, "its model was changed", now_s)

    def _take_in(self, facts: RequestFacts, replica: Replica, now_s: float) -> None:
        """Give a request its place on the replica. Its progress is unknown, so its first token is no sample."""
        self._requests[facts.id] = Request(
            facts,
            arrived_s=now_s,
            replica=replica.id,
            dispatched_s=now_s,
            attempt=1,
            is_answered=True,
            is_proven=True,
            lineage=replica.lineage,
            answered_s=now_s,
        )
        self._cluster.begin_request(replica.id, facts.id, prefix=facts.prefix, now_s=now_s)
        if (state := self._models.get(facts.model)) is not None:
            state.num_ongoing += 1
        else:
            self._strays.add(facts.model)
        self._touched[facts.model] = None
