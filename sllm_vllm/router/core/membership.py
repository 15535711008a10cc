"""Nodes that join, report, leave and are drained. Pure; part of ``RouterCore``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sllm_vllm.router.core.cluster import Replica, ReplicaState
from sllm_vllm.router.core.events import NodeJoined, NodeReported
from sllm_vllm.router.core.model_state import ModelState
from sllm_vllm.router.core.queues import ModelQueues
from sllm_vllm.router.core.recovery import Recovery
from sllm_vllm.router.core.scaling import Scaling


class Membership:
    """Which nodes are there, and which of them take starts.

    A cordon belongs to the node's name: a node that leaves and rejoins is still drained. ``touched`` gets the models
    whose replicas changed, or that may find a place now.
    """

    def __init__(
        self,
        scaling: Scaling,
        models: Mapping[str, ModelState],
        queues: ModelQueues,
        *,
        recovery: Recovery,
        touched: dict[str, None],
    ) -> None:
        self._scaling = scaling
        self._recovery = recovery
        self._cluster = scaling.cluster
        self._models = models
        self._queues = queues
        self._touched = touched
        self.cordoned: set[str] = set()
        """Names of cordoned nodes, whether they are there or not."""

    def joined(self, event: NodeJoined, now_s: float) -> None:
        """Add a node that joined, with the replicas found on it."""
        self._cluster.add_node(event.node, event.num_slots, is_warm=event.is_warm)
        if event.report is not None:
            self.reported(event.report, now_s)
        self._recovery.replicas_found(event.found, event.node, now_s)
        if event.node in self.cordoned:
            self.drain(event.node, now_s)
        self._touch_wanting()

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

    def lost(self, node: str, now_s: float) -> list[Replica]:
        """Remove a node that is gone, and return the replicas lost with it."""
        if node not in self._cluster.nodes:
            return []
        self._call_off_starts(node, now_s)
        gone = list(self._cluster.nodes[node].replicas.values())
        self._cluster.remove_node(node)
        self._scaling.forget_node(node)
        for replica in gone:
            self._scaling.predictions.pop(replica.id, None)
            self._scaling.pin(replica.model)
            self._touched[replica.model] = None
        return gone

    def drain_asked(self, target: str, now_s: float) -> None:
        """Drain a node or a replica for an operator; unknown names are ignored."""
        if target in self._cluster.nodes:
            self.drain(target, now_s)
        elif (replica := self._cluster.replicas.get(target)) is not None:
            self._scaling.drain(target, now_s)
            self._scaling.pin(replica.model)
            self._touched[replica.model] = None

    def drain(self, node: str, now_s: float) -> None:
        """Cordon a node: call off its starts, stop its idle replicas, and drain the busy ones."""
        self.cordoned.add(node)
        self._cluster.set_cordoned(node, True)
        self._call_off_starts(node, now_s)
        for replica in list(self._cluster.nodes[node].replicas.values()):
            if replica.state is ReplicaState.ORDERED:
                self._scaling.stop(replica.id, "its node is drained", now_s)
            self._scaling.drain(replica.id, now_s)
            if replica.model:  # a replica without a model is a placeholder of slots held for a start
                self._scaling.pin(replica.model)
                self._touched[replica.model] = None

    def undrain(self, node: str) -> None:
        """Let a node take starts again. Replicas that drain there still end."""
        self.cordoned.discard(node)
        if node in self._cluster.nodes:
            self._cluster.set_cordoned(node, False)
            self._touch_wanting()

    def _call_off_starts(self, node: str, now_s: float) -> None:
        for pending in self._scaling.pending.of_node(node):
            self._scaling.call_off(pending, now_s)
            self._touched[pending.model] = None

    def _touch_wanting(self) -> None:
        """Touch every model that may lack a replica: it has a minimum, or requests that wait."""
        kept = [name for name, state in self._models.items() if state.spec.min_replicas]
        self._touched.update(dict.fromkeys([*kept, *self._queues.models()]))
