"""Starts that wait until their slots are free, and the names of replicas. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.placement import Plan

SLUG_MAX = 40


@dataclass(slots=True)
class PendingStart:
    """A plan whose victims have not all ended. ``holds``: placeholders of free slots that are reserved for it."""

    replica: str
    model: str
    generation: int
    num_slots: int
    """Slots that it needs, as of its decision."""
    plan: Plan
    victims: set[str]
    """Victims that have not ended."""
    drained: set[str] = field(default_factory=set)
    """Victims that had requests, and take requests again if this start is called off."""
    holds: list[str] = field(default_factory=list)


def slug_of(model: str) -> str:
    """Return the first part of a replica's name: the model's last path component, reduced to valid characters."""
    last = model.rpartition("/")[2]
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in last)
    return kept.strip("-._")[:SLUG_MAX] or "model"


class PendingStarts:
    """All pending starts. Owned by ``Scaling``.

    The free slots that they need, and those that their victims free, are held by placeholder replicas in the cluster,
    so that no slot is promised twice.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._by_victim: dict[str, PendingStart] = {}
        self._by_model: dict[str, dict[str, PendingStart]] = {}
        self._num_holds = 0

    def add(self, pending: PendingStart, now_s: float) -> None:
        """Add a start that waits for its victims, which the caller is about to stop or drain."""
        self._by_model.setdefault(pending.model, {})[pending.replica] = pending
        for victim in pending.victims:
            self._by_victim[victim] = pending
        num_freed = sum(self._cluster.replicas[victim].num_slots for victim in pending.victims)
        if num_freed < pending.num_slots:
            self._hold(pending, pending.num_slots - num_freed, now_s)

    def victim_ended(self, victim: Replica, now_s: float) -> PendingStart | None:
        """Note that a replica was removed. Returns the start that has all its slots now, if any, and forgets it."""
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
        """Forget a start, which starts now or never, and release the slots held for it."""
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
        """Return the model's pending starts, oldest first."""
        return list(self._by_model.get(model, {}).values())

    def draining(self) -> PendingStart | None:
        """Return a start that waits for a draining replica, if any."""
        replicas = self._cluster.replicas
        waiting = (one for name, one in self._by_victim.items() if replicas[name].state is ReplicaState.DRAINING)
        return next(waiting, None)

    def let_end(self, victim: str) -> None:
        """Let a victim end even if the start that needs its slots is called off."""
        if (pending := self._by_victim.get(victim)) is not None:
            pending.drained.discard(victim)

    def of_node(self, node: str) -> list[PendingStart]:
        """Return the node's pending starts. Scans all of them."""
        return [one for one in self.all() if one.plan.node == node]

    def all(self) -> list[PendingStart]:
        """Return all pending starts."""
        return [one for of_model in self._by_model.values() for one in of_model.values()]

    def _hold(self, pending: PendingStart, num_slots: int, now_s: float) -> None:
        self._num_holds += 1
        hold = f"hold-{self._num_holds}"
        node, stopping = pending.plan.node, ReplicaState.STOPPING
        self._cluster.add_replica(
            Replica(id=hold, model="", node=node, num_slots=num_slots, state=stopping, state_since_s=now_s)
        )
        pending.holds.append(hold)
