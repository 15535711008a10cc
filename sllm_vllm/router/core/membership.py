"""Nodes that join, report, leave and are drained. Pure; part of ``RouterCore``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sllm_vllm.router.core.cluster import Replica, ReplicaState
from sllm_vllm.router.core.events import ModelDeployed, NodeJoined, NodeReported, Todo
from sllm_vllm.router.core.facts import FoundReplica, ModelSpec, RequestFacts
from sllm_vllm.router.core.model_state import CoreState, ModelState, Request
from sllm_vllm.router.core.queues import ModelQueues
from sllm_vllm.router.core.scaling import Scaling


class Deployments:
    """Which models are served, and how: they are deployed, changed and deleted here. Only reads the requests."""

    def __init__(self, scaling: Scaling, core_state: CoreState, queues: ModelQueues) -> None:
        self._scaling = scaling
        self._models = core_state.models
        self._queues = queues
        self._requests = core_state.requests
        self._strays = core_state.strays

    def deployed(self, event: ModelDeployed, now_s: float) -> Todo:
        """Deploy a new model, or change one that is deployed."""
        spec, todo = event.spec, Todo()
        for node, tier in event.tiers.items():
            if node in self._scaling.cluster.nodes:
                self._scaling.cluster.set_tier(node, spec.name, tier)
        known = self._models.get(spec.name)
        if known is None:
            self._models[spec.name] = ModelState(spec, num_ongoing=self._num_left(spec.name))
        else:
            todo.add(self._change(known, spec, now_s))
        self._scaling.pin(spec.name)
        todo.look_at((spec.name,))
        return todo

    def _num_left(self, model: str) -> int:
        """Count the requests still on replicas from before the model was deleted.

        Scans all requests, but only if there may be some.
        """
        if model not in self._strays:
            return 0
        self._strays.discard(model)
        return sum(one.replica is not None and one.facts.model == model for one in self._requests.values())

    def _change(self, known: ModelState, spec: ModelSpec, now_s: float) -> Todo | None:
        is_changed = spec.generation != known.spec.generation
        old_nbytes, nbytes = known.spec.nbytes, spec.nbytes
        # If nothing relevant changed, keep the known size: it may come from a checkpoint, which knows it better.
        nbytes = (nbytes or old_nbytes) if is_changed else (old_nbytes or nbytes)
        known.spec = replace(spec, nbytes=nbytes)
        known.num_kept = self._queues.waiting(spec.name)
        known.back_off.succeeded()  # the cause may have been fixed outside the router
        todo = self._scaling.replace_generation(known, now_s) if is_changed else None
        self._scaling.reset_idle(spec.name, now_s)
        return todo

    def deleted(self, model: str, now_s: float) -> Todo:
        """Forget a model without waiting requests, call off its starts, and drain its replicas."""
        todo = Todo()
        for pending in self._scaling.pending.of_model(model):
            todo.resumed += self._scaling.call_off(pending, now_s)
        if self._models.pop(model).num_ongoing:
            self._strays.add(model)
        self._scaling.forget_model(model)
        for replica in self._scaling.cluster.replicas_of(model):
            if replica.state is ReplicaState.ORDERED:
                todo.do(self._scaling.stop(replica.id, "its model was deleted", now_s))
            todo.do(self._scaling.drain(replica.id, now_s))
        return todo


class Recovery:
    """Takes over the replicas and requests that an earlier process of the router left running, as if ordered here.

    The agents know which replicas run, and the processes that stream requests know which requests run; here both are
    joined again. Nothing that runs is ended because its router restarted.
    """

    def __init__(self, scaling: Scaling, core_state: CoreState) -> None:
        self._scaling = scaling
        self._cluster = scaling.cluster
        self._models = core_state.models
        self._requests = core_state.requests
        self._strays = core_state.strays

    def replicas_found(self, found: Iterable[FoundReplica], node: str, now_s: float) -> Todo:
        """Take over the replicas found on a node that just joined; outdated ones are drained or stopped."""
        todo = Todo()
        for one in found:
            if one.id not in self._cluster.replicas and one.num_slots <= self._cluster.free_slots(node):
                todo.add(self._replica_found(one, node, now_s))
        return todo

    def request_found(self, facts: RequestFacts, replica_id: str, now_s: float) -> Todo | None:
        """Take over a request that is being streamed from a replica.

        A request that is known already, or whose replica is gone, is ignored.
        """
        replica = self._cluster.replicas.get(replica_id)
        if replica is None or facts.id in self._requests:
            return None
        if replica.state is ReplicaState.READY:
            self._take_in(facts, replica, now_s)
        elif replica.state is ReplicaState.DRAINING:
            self._cluster.set_state(replica_id, ReplicaState.READY, now_s)
            self._take_in(facts, replica, now_s)
            self._cluster.set_state(replica_id, ReplicaState.DRAINING, now_s)
        else:
            return None
        return Todo(models={facts.model: None})

    def _replica_found(self, found: FoundReplica, node: str, now_s: float) -> Todo:
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
        todo = Todo(models={found.model: None})
        state = self._models.get(found.model)
        is_current = state is not None and state.spec.generation == found.generation
        if found.is_stopping:
            self._cluster.set_state(found.id, ReplicaState.STOPPING, now_s)
        elif found.is_ready:
            self._cluster.set_state(found.id, ReplicaState.READY, now_s)
            for facts in found.requests:
                if facts.id not in self._requests:
                    self._take_in(facts, replica, now_s)
                    todo.look_at((facts.model,))
            if not is_current:
                todo.do(self._scaling.drain(found.id, now_s))
            elif not replica.ongoing:
                todo.do(self._scaling.became_idle(replica, now_s))
            self._scaling.pin(found.model)
        elif not is_current:
            todo.do(self._scaling.stop(found.id, "its model was changed", now_s))
        return todo

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


class Membership:
    """Which nodes are there, and which of them take starts.

    A cordon belongs to the node's name: a node that leaves and rejoins is still drained.
    """

    def __init__(
        self, scaling: Scaling, models: Mapping[str, ModelState], queues: ModelQueues, *, recovery: Recovery
    ) -> None:
        self._scaling = scaling
        self._recovery = recovery
        self._cluster = scaling.cluster
        self._models = models
        self._queues = queues
        self.cordoned: set[str] = set()
        """Names of cordoned nodes, whether they are there or not."""

    def joined(self, event: NodeJoined, now_s: float) -> Todo:
        """Add a node that joined, with the replicas found on it."""
        self._cluster.add_node(event.node, event.num_slots, is_warm=event.is_warm)
        if event.report is not None:
            self.reported(event.report, now_s)
        todo = self._recovery.replicas_found(event.found, event.node, now_s)
        if event.node in self.cordoned:
            todo.add(self._drain(event.node, now_s))
        todo.look_at(self._wanting())
        todo.has_room = True
        return todo

    def reported(self, event: NodeReported, now_s: float) -> None:
        """Apply a node's report. Reports from unknown nodes are ignored."""
        if event.node not in self._cluster.nodes:
            return
        self._cluster.set_warm(event.node, event.is_warm, at_s=now_s + event.warm_in_s)
        self._cluster.set_residency(event.node, event.residency)
        self._scaling.estimator.observe_hops(event.node, event.hops)
        for model, nbytes in event.nbytes.items():
            state = self._models.get(model)
            if state is not None and state.spec.nbytes != nbytes:
                state.spec = replace(state.spec, nbytes=nbytes)

    def lost(self, node: str, now_s: float) -> tuple[list[Replica], Todo | None]:
        """Remove a node that is gone. Returns the replicas lost with it, and what is to be done."""
        if node not in self._cluster.nodes:
            return [], None
        todo = self._call_off_starts(node, now_s)
        gone = list(self._cluster.nodes[node].replicas.values())
        self._cluster.remove_node(node)
        self._scaling.forget_node(node)
        for replica in gone:
            self._scaling.predictions.pop(replica.id, None)
            self._scaling.pin(replica.model)
        todo.look_at(replica.model for replica in gone)
        return gone, todo

    def drain_asked(self, target: str, now_s: float) -> Todo | None:
        """Drain a node or a replica for an operator; unknown names are ignored."""
        if target in self._cluster.nodes:
            return self._drain(target, now_s)
        replica = self._cluster.replicas.get(target)
        if replica is None:
            return None
        todo = Todo(models={replica.model: None})
        todo.do(self._scaling.drain(target, now_s))
        self._scaling.pin(replica.model)
        return todo

    def _drain(self, node: str, now_s: float) -> Todo:
        """Cordon a node: call off its starts, stop its idle replicas, and drain the busy ones."""
        self.cordoned.add(node)
        self._cluster.set_cordoned(node, True)
        todo = self._call_off_starts(node, now_s)
        for replica in list(self._cluster.nodes[node].replicas.values()):
            if replica.state is ReplicaState.ORDERED:
                todo.do(self._scaling.stop(replica.id, "its node is drained", now_s))
            todo.do(self._scaling.drain(replica.id, now_s))
            if replica.model:  # a replica without a model is a placeholder of slots held for a start
                self._scaling.pin(replica.model)
                todo.look_at((replica.model,))
        return todo

    def undrain(self, node: str) -> Todo:
        """Let a node take starts again. Replicas that drain there still end."""
        todo = Todo(has_room=True)
        self.cordoned.discard(node)
        if node in self._cluster.nodes:
            self._cluster.set_cordoned(node, False)
            todo.look_at(self._wanting())
        return todo

    def _call_off_starts(self, node: str, now_s: float) -> Todo:
        todo = Todo()
        for pending in self._scaling.pending.of_node(node):
            todo.resumed += self._scaling.call_off(pending, now_s)
            todo.look_at((pending.model,))
        return todo

    def _wanting(self) -> list[str]:
        """Return the models that may lack a replica: they have a minimum, or requests that wait."""
        kept = [name for name, state in self._models.items() if state.spec.min_replicas]
        return [*kept, *self._queues.models()]
