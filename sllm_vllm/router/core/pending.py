"""Starts that wait until their slots are free, and what replicas are called. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.placement import Plan

SLUG_MAX = 40


@dataclass(slots=True)
class PendingStart:
    """A plan whose victims have not all ended. ``holds``: placeholders of slots that are free and promised to it."""

    replica: str
    model: str
    generation: int
    num_slots: int
    """All that it needs, as it was when it was decided."""
    plan: Plan
    victims: set[str]
    """That have not ended."""
    drained: set[str] = field(default_factory=set)
    """Victims that had requests, and take some again if it does not start."""
    holds: list[str] = field(default_factory=list)


def slug_of(model: str) -> str:
    """What a replica's name begins with: the model's last word, without what a name may not hold."""
    last = model.rpartition("/")[2]
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in last)
    return kept.strip("-._")[:SLUG_MAX] or "model"


class PendingStarts:
    """All of them. What is free on their nodes, and what their victims free, is held for them by placeholders in the
    cluster, so that no slot is promised twice. Owned by ``Scaling``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._by_victim: dict[str, PendingStart] = {}
        self._by_model: dict[str, dict[str, PendingStart]] = {}
        self._num_holds = 0

    def add(self, pending: PendingStart, now_s: float) -> None:
        """It waits for its victims, which are about to be stopped or drained."""
        self._by_model.setdefault(pending.model, {})[pending.replica] = pending
        for victim in pending.victims:
            self._by_victim[victim] = pending
        num_freed = sum(self._cluster.replicas[victim].num_slots for victim in pending.victims)
        if num_freed < pending.num_slots:
            self._hold(pending, pending.num_slots - num_freed, now_s)

    def victim_ended(self, victim: Replica, now_s: float) -> PendingStart | None:
        """A replica was removed. Returns the start whose slots are all free now, if there is one; it is forgotten."""
        pending = self._by_victim.get(victim.id)
        if pending is None:
            return None
        pending.victims.discard(victim.id)
        del self._by_victim[victim.id]
        if pending.victims:
            self._hold(pending, victim.num_slots, now_s)
            return None
        self.forget(pending)
        return pending

    def forget(self, pending: PendingStart) -> None:
        """It starts now, or never; its holds are let go."""
        for hold in pending.holds:
            if hold in self._cluster.replicas:  # else its node is gone
                self._cluster.remove_replica(hold)
        of_model = self._by_model[pending.model]
        del of_model[pending.replica]
        if not of_model:
            del self._by_model[pending.model]
        for victim in pending.victims:
            del self._by_victim[victim]

    def of_model(self, model: str) -> list[PendingStart]:
        """Those of a model, oldest first."""
        return list(self._by_model.get(model, {}).values())

    def draining(self) -> PendingStart | None:
        """One that waits for replicas that still have requests, if there is one."""
        replicas = self._cluster.replicas
        waiting = (one for name, one in self._by_victim.items() if replicas[name].state is ReplicaState.DRAINING)
        return next(waiting, None)

    def let_end(self, victim: str) -> None:
        """It is to end, whatever becomes of the start that it was to end for."""
        if (pending := self._by_victim.get(victim)) is not None:
            pending.drained.discard(victim)

    def of_node(self, node: str) -> list[PendingStart]:
        """Those on a node. Looks at all."""
        return [one for one in self.all() if one.plan.node == node]

    def all(self) -> list[PendingStart]:
        """All there are."""
        return [one for of_model in self._by_model.values() for one in of_model.values()]

    def _hold(self, pending: PendingStart, num_slots: int, now_s: float) -> None:
        self._num_holds += 1
        hold = f"hold-{self._num_holds}"
        node, stopping = pending.plan.node, ReplicaState.STOPPING
        self._cluster.add_replica(
            Replica(id=hold, model="", node=node, num_slots=num_slots, state=stopping, state_since_s=now_s)
        )
        pending.holds.append(hold)
