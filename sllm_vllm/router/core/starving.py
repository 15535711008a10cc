"""Where to make room for a starving model at the cost of busy replicas. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sllm_vllm.router.core.cluster import Cluster, Node, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.facts import ModelSpec, RequestFacts
from sllm_vllm.router.core.model_state import ModelState
from sllm_vllm.router.core.placement import Plan, PlanKind


@dataclass(frozen=True, slots=True)
class Room:
    """A node, and its replicas that have to end: idle ones at once, busy ones when their requests have ended."""

    node: str
    victims: tuple[str, ...]
    num_requests: int
    """Requests on the victims, which must end first."""


def find_room(cluster: Cluster, model: str, num_slots: int, *, may_end: Callable[[Replica], bool]) -> Room | None:
    """Return the room with the fewest requests in the way; None if no node can free ``num_slots``.

    Scans all nodes' counts, and the replicas of the nodes that can free enough slots.
    """
    rooms = (
        _room_on(node, num_slots, _candidates(node, model, may_end))
        for node in cluster.nodes.values()
        if _is_enough(node, num_slots)
    )
    return min((room for room in rooms if room is not None), key=lambda one: (one.num_requests, one.node), default=None)


def plan_in(
    room: Room,
    spec: ModelSpec,
    cluster: Cluster,
    *,
    estimator: Estimator,
    models: Mapping[str, ModelState],
    head: RequestFacts | None,
) -> Plan:
    """Return the plan of a start in this room.

    The running requests are assumed to take as long as their models' requests usually do.
    """
    tier, is_warm = cluster.tier(room.node, spec.name), cluster.nodes[room.node].is_warm
    names = [cluster.replicas[victim].model for victim in room.victims]
    service_s = {name: models[name].service_s if name in models else 0.0 for name in names}
    queue_s = max(estimator.stop_s(name, room.node) + service_s[name] for name in names)
    prompt_tokens = 0 if head is None else head.prompt_tokens
    estimate = estimator.estimate_start(
        spec, room.node, tier, is_warm=is_warm, prompt_tokens=prompt_tokens, queue_s=queue_s
    )
    return Plan(PlanKind.EVICT, room.node, tier, is_warm, estimate, room.victims)


def fits_somewhere(cluster: Cluster, num_slots: int) -> bool:
    """Whether any node that takes starts has ``num_slots`` slots in total, free or not."""
    return any(node.num_slots >= num_slots and not node.is_cordoned for node in cluster.nodes.values())


def _is_enough(node: Node, num_slots: int) -> bool:
    return node.num_open >= 0 and node.num_free + node.num_evictable + node.num_busy >= num_slots


def _room_on(node: Node, num_slots: int, candidates: Iterable[Replica]) -> Room | None:
    """Choose replicas to end: those with the fewest requests first, on ties those that became ready first."""
    num_free, num_requests = node.num_free, 0
    victims: list[str] = []
    for replica in sorted(candidates, key=_cost):
        if num_free >= num_slots:
            break
        num_free += replica.num_slots
        num_requests += len(replica.ongoing)
        victims.append(replica.id)
    return Room(node.id, tuple(victims), num_requests) if num_free >= num_slots and victims else None


def _candidates(node: Node, model: str, may_end: Callable[[Replica], bool]) -> Iterable[Replica]:
    replicas = [one for one in node.replicas.values() if one.state is ReplicaState.READY and not one.is_pinned]
    return [one for one in replicas if one.model != model and may_end(one)]


def _cost(replica: Replica) -> tuple[int, float, str]:
    return len(replica.ongoing), replica.ready_s or 0.0, replica.id
