"""Where a model could be started, what would have to be stopped, and when it would answer. Pure; called by the core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import NamedTuple

from sllm_vllm.router.core.cluster import Cluster, Node, Replica, ReplicaState
from sllm_vllm.router.core.facts import Estimate, ModelSpec, RequestFacts, Term, Tier
from sllm_vllm.router.core.model_state import ModelState
from sllm_vllm.router.core.rules import RuleBook


class Victim(NamedTuple):
    """A replica that may be stopped to free its slots, and the expected cost: in any unit, never negative."""

    id: str
    num_slots: int
    cost: float


def choose_victims(idle: Sequence[Victim], num_slots_needed: int) -> tuple[str, ...] | None:
    """Return the ids of the cheapest victims whose slots suffice; None if even all of them do not.

    Exact: dynamic programming over the slots freed so far. Ties: fewer slots freed, fewer victims, then the ids.
    """
    if num_slots_needed <= 0:
        return ()
    if num_slots_needed == 1:
        return (min(idle, key=lambda victim: (victim.cost, victim.num_slots, victim.id)).id,) if idle else None
    best: dict[int, tuple[float, int, tuple[str, ...]]] = {0: (0.0, 0, ())}  # by slots: cost, number, ids
    for victim in sorted(idle):
        for slots, (cost, num, ids) in list(best.items()):
            if slots >= num_slots_needed:
                continue  # enough already: costs are not negative, so another victim is never better
            freed = slots + victim.num_slots
            more = (cost + victim.cost, num + 1, (*ids, victim.id))
            if freed not in best or more < best[freed]:
                best[freed] = more
    enough = [(cost, slots, num, ids) for slots, (cost, num, ids) in best.items() if slots >= num_slots_needed]
    return min(enough)[3] if enough else None


SLACK_S = 0.1
SLACK_SHARE = 0.05
"""Share of the soonest plan's time by which a less costly plan may be later, if that is more than the slack."""
EVICTABLE_TIMES_MAX = 16
"""Factor by which more nodes are searched for victims if the first search finds no plan."""
ROOM_REPLICAS_MAX = 64
"""Replicas examined for room for requests that would have to move."""


class PlanKind(Enum):
    """What happens before a start. On ties the kind listed first is preferred."""

    START = "start"
    """Nothing: enough slots are free."""
    EVICT = "evict"
    """Idle replicas are stopped."""
    MIGRATE = "migrate"
    """Requests are moved to other replicas of their models; then the replicas they left are stopped."""


_RANK = {kind: rank for rank, kind in enumerate(PlanKind)}


@dataclass(frozen=True, slots=True)
class Relocation:
    """A new replica of a victim's model on another node, for the victim's requests (ServerlessLLM, section 5)."""

    model: str
    node: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """A possible start. ``estimate`` extends to the first token of the first request."""

    kind: PlanKind
    node: str
    tier: Tier
    is_warm: bool
    estimate: Estimate
    victims: tuple[str, ...] = ()
    """Replicas to stop first."""
    moved: tuple[str, ...] = ()
    """Requests to migrate before the victims are stopped."""
    relocations: tuple[Relocation, ...] = ()
    """Replicas to start for the moved requests."""
    loss_s: float = 0.0
    """Startup time that stopping its victims is expected to cost later."""


def plan_starts(
    rules: RuleBook, spec: ModelSpec, *, prompt_tokens: int, now_s: float, most: PlanKind = PlanKind.MIGRATE
) -> list[Plan]:
    """Return plans for one more replica, the soonest first; at most one of each kind per node, no kind after ``most``.

    A plan with victims is included only if it is sooner than every plan of an earlier kind in ``PlanKind``. Eviction
    plans that are later than the soonest one by more than the slack may be missing.
    """
    planner = _Planner(rules, spec, prompt_tokens=prompt_tokens, now_s=now_s)
    plans = planner.starts()
    if most is not PlanKind.START:
        plans += planner.evictions(sooner_than_s=_soonest_s(plans))
    if most is PlanKind.MIGRATE and rules.may_move:
        plans += planner.migrations(sooner_than_s=_soonest_s(plans))
    timed = [(plan.estimate.total_s, _RANK[plan.kind], plan.node, plan) for plan in plans]
    timed.sort(key=lambda entry: entry[:3])
    return [entry[3] for entry in timed]


def best_plan(plans: Sequence[Plan], *, slack_s: float = SLACK_S) -> Plan | None:
    """Return the plan that costs others least, among those at most ``slack_s``, or 5 %, later than the first.

    ``plans`` must be sorted. A plan without victims costs others nothing. On ties, prefers the plan with the weights in
    the fastest tier, and then the first: their predicted times are too close to tell apart, and a checkpoint that is
    already there need not be fetched or stored twice.
    """
    if not plans:
        return None
    latest_s = _latest_s(plans[0].estimate.total_s, slack_s)
    near = [plan for plan in plans if plan.estimate.total_s <= latest_s]
    return min(near, key=lambda plan: (bool(plan.victims), plan.loss_s, plan.tier))


def _latest_s(first_s: float, slack_s: float) -> float:
    return first_s + max(slack_s, SLACK_SHARE * first_s)


def _soonest_s(plans: Iterable[Plan]) -> float:
    return min((plan.estimate.total_s for plan in plans), default=inf)


class _Planner:
    """The planning of one start, with its inputs."""

    def __init__(self, rules: RuleBook, spec: ModelSpec, *, prompt_tokens: int, now_s: float) -> None:
        self._rules = rules
        self._cluster = rules.cluster
        self._estimator = rules.estimator
        self._spec = spec
        self._prompt_tokens = prompt_tokens
        self._now_s = now_s

    def starts(self) -> list[Plan]:
        """Return plans on free slots."""
        nodes = self._cluster.candidates(self._spec.name, self._spec.accelerators, max(1, self._rules.nodes_max // 2))
        return [self._plan(PlanKind.START, node, self._estimate(node)) for node in nodes]

    def evictions(self, *, sooner_than_s: float) -> list[Plan]:
        """Return plans that evict idle replicas.

        Searches more nodes if there is no plan at all, because the first nodes' idle replicas may have to stay.
        """
        plans: list[Plan] = []
        for num_max in (self._rules.nodes_max, self._rules.nodes_max * EVICTABLE_TIMES_MAX):
            nodes = self._cluster.evictable(self._spec.name, self._spec.accelerators, num_max)
            plans = self._evictions(nodes, sooner_than_s)
            if plans or sooner_than_s < inf or len(nodes) < num_max:
                break
        return plans

    def _evictions(self, nodes: Iterable[str], sooner_than_s: float) -> list[Plan]:
        """Choose victims only on nodes that could be the soonest: choosing is the most expensive step."""
        plans = []
        soonest_s = sooner_than_s
        estimates = [(node, self._estimate(node)) for node in nodes]  # sorted by node on ties, never by estimate
        for at_best_s, node, estimate in sorted((one.total_s, node, one) for node, one in estimates):
            if at_best_s > _latest_s(soonest_s, SLACK_S):
                break
            plan = self._eviction(node, estimate)
            if plan is not None and (total_s := plan.estimate.total_s) < sooner_than_s:
                plans.append(plan)
                soonest_s = min(soonest_s, total_s)
        return plans

    def migrations(self, *, sooner_than_s: float) -> list[Plan]:
        """Return plans that move requests off busy replicas, on nodes that have the model."""
        nodes = self._cluster.movable(self._spec.name, self._spec.accelerators, self._rules.nodes_max)
        plans = [self._migration(node, sooner_than_s) for node in nodes]
        return [plan for plan in plans if plan is not None]

    def _eviction(self, node: str, estimate: Estimate) -> Plan | None:
        victims = self._choose(node, self._idle_victims(node))
        if victims is None:
            return None
        return self._plan(PlanKind.EVICT, node, _queued(estimate, self._stop_s(node, victims)), victims=victims)

    def _migration(self, node: str, sooner_than_s: float) -> Plan | None:
        estimate = self._estimate(node)
        if estimate.total_s >= sooner_than_s:
            return None
        busy = [
            Victim(replica.id, replica.num_slots, self._resume_s(replica.ongoing))
            for replica in self._cluster.nodes[node].replicas.values()
            if self._may_move(replica)
        ]
        victims = self._choose(node, [*self._idle_victims(node), *busy])
        if victims is None:
            return None
        replicas = [self._cluster.replicas[victim] for victim in victims]
        relocations = self._relocations(replicas)
        moved = tuple(sorted(request for replica in replicas for request in replica.ongoing))
        if relocations is None or not moved:
            return None
        start_s = max((one.estimate.total_s for one in relocations), default=0.0)
        give_way_s = start_s + self._resume_s(moved) + self._stop_s(node, victims)
        estimate = _queued(estimate, give_way_s)
        if estimate.total_s >= sooner_than_s:
            return None
        return self._plan(
            PlanKind.MIGRATE, node, estimate, victims=victims, moved=moved, relocations=tuple(relocations)
        )

    def _resume_s(self, requests: Iterable[str]) -> float:
        return sum(self._rules.resume_s(request, self._now_s) for request in requests)

    def _relocations(self, leaving: Sequence[Replica]) -> list[Relocation] | None:
        """Return the replicas to start for requests of ``leaving`` that the existing replicas have no room for.

        Each goes on free slots of another node, where it would be ready soonest. None if one of them finds no place.
        """
        found: list[Relocation] = []
        taken: dict[str, int] = {}
        placed: Counter[str] = Counter()  # requests that existing replicas take, by model
        for replica in leaving:
            num_placed = placed[replica.model] + len(replica.ongoing)
            if not replica.ongoing or self._num_room(replica, leaving) >= num_placed:
                placed[replica.model] = num_placed
                continue
            spec = self._rules.spec_of(replica)
            one = None if spec is None else self._relocation(spec, replica, taken)
            if one is None:
                return None
            found.append(one)
            taken[one.node] = taken.get(one.node, 0) + replica.num_slots
        return found if len({one.model for one in found}) == len(found) else None

    def _relocation(self, spec: ModelSpec, replica: Replica, taken: Mapping[str, int]) -> Relocation | None:
        nodes = [
            node
            for node in self._cluster.candidates(spec.name, spec.accelerators, max(1, self._rules.nodes_max // 2))
            if node != replica.node and self._cluster.nodes[node].num_open - taken.get(node, 0) >= spec.accelerators
        ]
        starts = [(self._estimate(node, spec), node) for node in nodes]
        best = min(starts, key=lambda start: (start[0].total_s, start[1]), default=None)
        return None if best is None else Relocation(spec.name, best[1], best[0])

    def _idle_victims(self, node: str) -> list[Victim]:
        return [
            Victim(replica.id, replica.num_slots, self._rules.keep_value_s(replica, self._now_s))
            for replica in self._cluster.evictable_on(node)
            if replica.model != self._spec.name and self._rules.is_spare(replica)
        ]

    def _choose(self, node: str, victims: Sequence[Victim]) -> tuple[str, ...] | None:
        return choose_victims(victims, self._spec.accelerators - self._cluster.free_slots(node))

    def _stop_s(self, node: str, victims: Iterable[str]) -> float:
        """Return how long stopping all victims takes; they are stopped at the same time."""
        replicas = self._cluster.replicas
        return max(self._estimator.stop_s(replicas[victim].model, node) for victim in victims)

    def _may_move(self, replica: Replica) -> bool:
        is_busy = replica.state is ReplicaState.READY and replica.ongoing and not replica.is_pinned
        return bool(
            is_busy
            and replica.model != self._spec.name
            and self._rules.is_spare(replica)
            and self._rules.may_empty(replica, self._now_s)
        )

    def _num_room(self, replica: Replica, leaving: Sequence[Replica]) -> int:
        """Return how many requests the other READY replicas of its model can take, without those in ``leaving``."""
        others = self._cluster.least_busy(replica.model, ROOM_REPLICAS_MAX)
        fit = [one for one in others if one not in leaving and one.lineage == replica.lineage]
        return sum(max(0, self._rules.room(one)) for one in fit)

    def _estimate(self, node_id: str, other: ModelSpec | None = None) -> Estimate:
        """Estimate a start queued behind the node's loads, of this planner's model or another one.

        For another model the prompt length is taken as 0.
        """
        node, spec = self._cluster.nodes[node_id], other or self._spec
        return self._estimator.estimate_start(
            spec,
            node_id,
            node.tiers.get(spec.name, Tier.REMOTE),
            is_warm=node.is_warm,
            prompt_tokens=self._prompt_tokens if other is None else 0,
            queue_s=node.start_wait_s(self._now_s),
        )

    def _plan(
        self,
        kind: PlanKind,
        node_id: str,
        estimate: Estimate,
        *,
        victims: tuple[str, ...] = (),
        moved: tuple[str, ...] = (),
        relocations: tuple[Relocation, ...] = (),
    ) -> Plan:
        node = self._cluster.nodes[node_id]
        tier = node.tiers.get(self._spec.name, Tier.REMOTE)
        loss_s = sum(self._rules.keep_value_s(self._cluster.replicas[victim], self._now_s) for victim in victims)
        return Plan(
            kind,
            node_id,
            tier,
            node.is_warm,
            estimate=estimate,
            victims=victims,
            moved=moved,
            relocations=relocations,
            loss_s=loss_s,
        )


def _queued(estimate: Estimate, seconds: float) -> Estimate:
    """Return the estimate with at least ``seconds`` of queueing; the two waits overlap."""
    return Estimate({**estimate.terms, Term.QUEUE: max(seconds, estimate.terms[Term.QUEUE])})


@dataclass(frozen=True, slots=True)
class Room:
    """A node where a starving model gets slots, and the replicas that have to end there.

    Idle ones end at once, busy ones when their requests have ended.
    """

    node: str
    victims: tuple[str, ...]
    num_requests: int
    """Requests on the victims, which must end first."""


def find_room(rules: RuleBook, model: str, num_slots: int) -> Room | None:
    """Return the room with the fewest requests in the way; None if no node can free ``num_slots``.

    Scans all nodes' counts, and the replicas of the nodes that can free enough slots.
    """
    rooms = (
        _room_on(node, num_slots, _candidates(node, model, rules))
        for node in rules.cluster.nodes.values()
        if _is_enough(node, num_slots)
    )
    return min((room for room in rooms if room is not None), key=lambda one: (one.num_requests, one.node), default=None)


def plan_in(
    room: Room, spec: ModelSpec, rules: RuleBook, *, models: Mapping[str, ModelState], head: RequestFacts | None
) -> Plan:
    """Return the plan of a start in this room.

    The running requests are assumed to take as long as their models' requests usually do.
    """
    cluster, estimator = rules.cluster, rules.estimator
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


def _candidates(node: Node, model: str, rules: RuleBook) -> Iterable[Replica]:
    replicas = [one for one in node.replicas.values() if one.state is ReplicaState.READY and not one.is_pinned]
    return [one for one in replicas if one.model != model and rules.is_spare(one)]


def _cost(replica: Replica) -> tuple[int, float, str]:
    return len(replica.ongoing), replica.ready_s or 0.0, replica.id
