"""The router's picture of nodes and replicas, with the indexes that make decisions quick. Pure; owned by the core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from types import MappingProxyType

from sllm_vllm.router.core.facts import Tier
from sllm_vllm.router.core.prefixes import PREFIXES_MAX, note_prefix
from sllm_vllm.router.core.ranking import Ranking
from sllm_vllm.router.core.shortlist import Holding, Shortlist


class ReplicaState(Enum):
    """Where a replica is in its life, as far as the router cares."""

    ORDERED = "ordered"
    """Its agent was told. It waits for slots, or starts."""
    READY = "ready"
    DRAINING = "draining"
    """It gets no new requests, and is to be stopped when its last one ends."""
    STOPPING = "stopping"
    """Its agent was told to stop it. It keeps its slots until it is removed."""


NEXT: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.ORDERED: frozenset({ReplicaState.READY, ReplicaState.STOPPING}),
    ReplicaState.READY: frozenset({ReplicaState.DRAINING, ReplicaState.STOPPING}),
    ReplicaState.DRAINING: frozenset({ReplicaState.READY, ReplicaState.STOPPING}),
    ReplicaState.STOPPING: frozenset(),
}


@dataclass(slots=True)
class Replica:
    """One running copy of a model, or one that was ordered. Changed by ``Cluster`` alone once it was added."""

    id: str
    model: str
    node: str
    generation: int = 0
    lineage: int = 0
    num_slots: int = 1
    state: ReplicaState = ReplicaState.ORDERED
    state_since_s: float = 0.0
    ongoing: set[str] = field(default_factory=set)
    """Ids of requests, of those that are moving here, too."""
    ordered_s: float = 0.0
    ready_at_s: float = 0.0
    """When it should be ready, as predicted."""
    ready_s: float | None = None
    """When it was."""
    idle_since_s: float | None = None  # while it is busy or not READY
    prefixes: dict[str, float] = field(default_factory=dict)
    """Prefixes of its requests and when each came last, the most recent last; at most ``PREFIXES_MAX``."""
    is_pinned: bool = False
    """Not to be evicted: one of those its model must keep."""
    unwanted_since_s: float | None = None
    """While it is ORDERED and nothing waits for it: another start may have its slots."""
    is_movable: bool = False
    """Requests can move here and away; no index knows it."""
    is_unmovable: bool = False
    """Its engine was asked, and can't."""


@dataclass(slots=True)
class Node:
    """A machine. Changed by ``Cluster`` alone."""

    id: str
    num_slots: int
    is_warm: bool = True
    """Whether its next start is forked from a warm parent process."""
    warm_at_s: float = 0.0
    """When that has imported: starts before wait for it."""
    load_until_s: float = 0.0
    """When the loads ordered so far end. They run one after the other."""
    tiers: dict[str, Tier] = field(default_factory=dict)
    """Models in HOST or on DISK."""
    replicas: dict[str, Replica] = field(default_factory=dict)
    num_free: int = 0
    num_evictable: int = 0
    """Slots of replicas that are idle and not pinned, or that start in vain; 0 where nothing may start."""
    num_busy: int = 0
    """Slots of replicas that are READY, have requests and are not pinned; 0 where nothing may start."""
    idle_since_s: float = inf
    """Of the evictable replica that has been idle the longest."""
    is_cordoned: bool = False
    """Nothing new may start there."""

    def start_wait_s(self, now_s: float) -> float:
        """How long a start that is ordered now waits: for loads before it, or for its warm parent."""
        return max(0.0, self.load_until_s - now_s, self.warm_at_s - now_s if self.is_warm else 0.0)

    @property
    def num_open(self) -> int:
        """Free slots that a start may have; less than none where nothing may start."""
        return -1 if self.is_cordoned else self.num_free


class Cluster:
    """Nodes, replicas, who is where, and which nodes are worth a look.

    A slot belongs to one replica, in whatever state, until that is removed: a node's replicas never have more slots
    than it has.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._replicas: dict[str, Replica] = {}
        self._by_state: dict[tuple[str, ReplicaState], dict[str, Replica]] = {}
        self._least_busy: Ranking[str] = Ranking()  # READY replicas by model and number of requests
        self._free: Ranking[int] = Ranking()  # nodes by free slots and end of loads
        self._idle: Ranking[tuple[int, int]] = Ranking()  # nodes by free slots, those and evictable, and longest idle
        self._holders: dict[Holding, set[str]] = {}
        self._free_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_free)
        self._idle_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_idle)
        self._busy_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_busy)
        self._shortlists = (self._free_holders, self._idle_holders, self._busy_holders)
        self.nodes: Mapping[str, Node] = MappingProxyType(self._nodes)
        self.replicas: Mapping[str, Replica] = MappingProxyType(self._replicas)

    # ------------------------------------------------------------------------------------------------------- nodes

    def add_node(self, node_id: str, num_slots: int, *, is_warm: bool = True) -> None:
        """It is there, with nothing on it."""
        assert node_id not in self._nodes, f"node {node_id} is there already"
        self._nodes[node_id] = node = Node(node_id, num_slots, is_warm)
        self._refresh(node)

    def remove_node(self, node_id: str) -> list[str]:
        """It is gone. Returns the replicas that are gone with it."""
        node = self._nodes[node_id]
        gone = sorted(node.replicas)
        for replica_id in gone:
            self.remove_replica(replica_id)
        self.set_residency(node_id, {})
        self._free.discard(node_id)
        for shortlist in self._shortlists:
            shortlist.offer(node_id)
        del self._nodes[node_id]
        return gone

    def set_warm(self, node_id: str, is_warm: bool, *, at_s: float = 0.0) -> None:
        """Whether its next start is forked from a warm parent process, and when there is one."""
        node = self._nodes[node_id]
        node.is_warm, node.warm_at_s = is_warm, at_s

    def set_cordoned(self, node_id: str, is_cordoned: bool) -> None:
        """Whether nothing new may start there; what runs there stays."""
        self._nodes[node_id].is_cordoned = is_cordoned
        self._refresh(self._nodes[node_id])

    def num_slots(self, node_id: str) -> int:
        """All it has."""
        return self._nodes[node_id].num_slots

    def free_slots(self, node_id: str) -> int:
        """Those that no replica has."""
        return self._nodes[node_id].num_free

    # --------------------------------------------------------------------------------------------------- residency

    def tier(self, node_id: str, model: str) -> Tier:
        """Where a start of it there would find its weights."""
        return self._nodes[node_id].tiers.get(model, Tier.REMOTE)

    def set_tier(self, node_id: str, model: str, tier: Tier) -> None:
        """It is there now, and in no faster tier."""
        tiers = self._nodes[node_id].tiers
        old = tiers.pop(model, Tier.REMOTE)
        if tier is not Tier.REMOTE:
            tiers[model] = tier
        if tier is not old:
            self._set_holder((model, old), (model, tier), node_id)

    def set_residency(self, node_id: str, tiers: Mapping[str, Tier]) -> None:
        """All it has. Models that are not named are REMOTE to it."""
        old = self._nodes[node_id].tiers
        for model in [model for model in old if model not in tiers]:
            self.set_tier(node_id, model, Tier.REMOTE)
        for model, tier in tiers.items():
            if old.get(model, Tier.REMOTE) is not tier:
                self.set_tier(node_id, model, tier)

    # ------------------------------------------------------------------------------------------------------- loads

    def load_until_s(self, node_id: str) -> float:
        """When the loads ordered so far end; in the past if none runs."""
        return self._nodes[node_id].load_until_s

    def extend_load(self, node_id: str, now_s: float, seconds: float) -> float:
        """One more load, behind those it has. Returns when it ends."""
        until_s = max(now_s, self._nodes[node_id].load_until_s) + seconds
        self.set_load_until(node_id, until_s)
        return until_s

    def set_load_until(self, node_id: str, until_s: float) -> None:
        """Its loads end then after all: one failed, or took another time than predicted."""
        node = self._nodes[node_id]
        is_sooner = until_s < node.load_until_s
        node.load_until_s = until_s
        self._free.put(node_id, node.num_open, until_s)
        if is_sooner:
            for holding in node.tiers.items():
                for shortlist in self._shortlists:
                    shortlist.lower(holding, node_id)

    # ---------------------------------------------------------------------------------------------------- replicas

    def add_replica(self, replica: Replica) -> None:
        """It was ordered, or found. Its node has the free slots for it, and it says itself since when it is idle."""
        node = self._nodes[replica.node]
        assert replica.id not in self._replicas, f"replica {replica.id} is there already"
        assert replica.num_slots <= node.num_free, f"no room for {replica.id} on {node.id}"
        self._replicas[replica.id] = node.replicas[replica.id] = replica
        self._file_state(replica)
        self._refresh(node)

    def remove_replica(self, replica_id: str) -> None:
        """Its slots are free."""
        replica = self._replicas.pop(replica_id)
        node = self._nodes[replica.node]
        del node.replicas[replica_id]
        self._unfile_state(replica)
        self._least_busy.discard(replica_id)
        self._refresh(node)

    def set_state(self, replica_id: str, state: ReplicaState, now_s: float) -> None:
        """It came into this state, which must be one that ``NEXT`` allows, or the one it has."""
        replica = self._replicas[replica_id]
        if state is replica.state:
            return
        assert state in NEXT[replica.state], f"{replica_id} cannot go from {replica.state.name} to {state.name}"
        self._unfile_state(replica)
        replica.state, replica.state_since_s = state, now_s
        is_ready = state is ReplicaState.READY
        if is_ready and replica.ready_s is None:
            replica.ready_s = now_s
        replica.idle_since_s = now_s if is_ready and not replica.ongoing else None
        replica.unwanted_since_s = None
        self._file_state(replica)
        self._refresh(self._nodes[replica.node])

    def set_pinned(self, replica_id: str, is_pinned: bool) -> None:
        """Whether it must be kept. Pinned ones hide no node that has others to evict."""
        replica = self._replicas[replica_id]
        if replica.is_pinned is not is_pinned:
            replica.is_pinned = is_pinned
            self._refresh(self._nodes[replica.node])

    def set_unwanted(self, replica_id: str, is_unwanted: bool, now_s: float) -> None:
        """Whether nothing waits for one that is ORDERED."""
        replica = self._replicas[replica_id]
        assert replica.state is ReplicaState.ORDERED, f"{replica_id} is {replica.state.name}"
        if (replica.unwanted_since_s is not None) is not is_unwanted:
            replica.unwanted_since_s = now_s if is_unwanted else None
            self._refresh(self._nodes[replica.node])

    def replicas_of(self, model: str, state: ReplicaState | None = None) -> tuple[Replica, ...]:
        """Those in a state, in the order they came into it; or all."""
        states = ReplicaState if state is None else (state,)
        return tuple(replica for one in states for replica in self._by_state.get((model, one), {}).values())

    def least_busy(self, model: str, num_max: int) -> list[Replica]:
        """Its READY replicas with the fewest requests, in that order and then by id."""
        return [self._replicas[name] for name in self._least_busy.first((model,), num_max)]

    def evictable_on(self, node_id: str) -> list[Replica]:
        """Its replicas that are idle and not pinned, or that start and nothing waits for."""
        replicas = self._nodes[node_id].replicas.values()
        return [one for one in replicas if _evictable_since_s(one) is not None]

    # ---------------------------------------------------------------------------------------------------- requests

    def begin_request(self, replica_id: str, request_id: str, *, prefix: str, now_s: float) -> None:
        """It was sent there. An empty prefix is not known."""
        replica = self._replicas[replica_id]
        assert replica.state is ReplicaState.READY, f"{replica_id} is {replica.state.name}"
        assert request_id not in replica.ongoing, f"{request_id} is on {replica_id} already"
        replica.ongoing.add(request_id)
        self._least_busy.put(replica_id, replica.model, len(replica.ongoing))
        if prefix:
            note_prefix(replica.prefixes, prefix, now_s)
        if replica.idle_since_s is not None:
            replica.idle_since_s = None
            self._refresh(self._nodes[replica.node])

    def end_request(self, replica_id: str, request_id: str, now_s: float) -> None:
        """It ended, or left."""
        replica = self._replicas[replica_id]
        replica.ongoing.remove(request_id)
        if replica.state is ReplicaState.READY:
            self._least_busy.put(replica_id, replica.model, len(replica.ongoing))
            if not replica.ongoing:
                replica.idle_since_s = now_s
                self._refresh(self._nodes[replica.node])

    # ------------------------------------------------------------------------------------------------- worth a look

    def candidates(self, model: str, num_slots: int, k: int) -> list[str]:
        """At most 2 k nodes with so many free slots: k that have the model, then k whose loads end first."""
        soon = self._free.first([free for free in self._free.groups() if free >= num_slots], k)
        return list(dict.fromkeys([*self._free_holders.fastest(model, num_slots, k), *soon]))

    def evictable(self, model: str, num_slots: int, k: int) -> list[str]:
        """At most k nodes where free slots do not suffice, and with those of evictable replicas do.

        Half of them have the model, if there are as many; then come those with a replica that was idle the longest.
        """
        holders = self._idle_holders.fastest(model, num_slots, max(1, k // 2))
        groups = [(free, room) for free, room in self._idle.groups() if free < num_slots <= room]
        return list(dict.fromkeys([*holders, *self._idle.first(groups, k)]))[:k]

    def movable(self, model: str, num_slots: int, k: int) -> list[str]:
        """At most k nodes that have the model, where only the slots of busy replicas make room."""
        return self._busy_holders.fastest(model, num_slots, k)

    # ---------------------------------------------------------------------------------------------------- invariants

    def validate(self) -> None:
        """Assert that no slot is used twice and that every index is what a recount gives."""
        for node in self._nodes.values():
            assert sum(one.num_slots for one in node.replicas.values()) <= node.num_slots, f"{node.id} is overcommitted"
            counts = node.num_free, node.num_evictable, node.num_busy, node.idle_since_s
            assert counts == _count(node), f"{node.id} is miscounted"
            assert all(self._replicas[name] is replica for name, replica in node.replicas.items())
            assert Tier.REMOTE not in node.tiers.values()
        assert sum(len(node.replicas) for node in self._nodes.values()) == len(self._replicas)
        for replica in self._replicas.values():
            is_idle = replica.state is ReplicaState.READY and not replica.ongoing
            assert (replica.idle_since_s is not None) == is_idle, f"{replica.id} is wrong about being idle"
            assert replica.unwanted_since_s is None or replica.state is ReplicaState.ORDERED
            assert len(replica.prefixes) <= PREFIXES_MAX
        filed = {(*key, name) for key, names in self._by_state.items() for name in names}
        assert filed == {(one.model, one.state, one.id) for one in self._replicas.values()}
        assert all(self._by_state.values()), "a state without replicas"
        self._validate_rankings()

    def _validate_rankings(self) -> None:
        nodes, replicas = self._nodes.values(), self._replicas.values()
        ready = [replica for replica in replicas if replica.state is ReplicaState.READY]
        self._least_busy.validate({one.id: (one.model, len(one.ongoing)) for one in ready})
        self._free.validate({node.id: (node.num_open, node.load_until_s) for node in nodes})
        idle = [node for node in nodes if node.num_evictable]
        self._idle.validate({n.id: ((n.num_free, n.num_free + n.num_evictable), n.idle_since_s) for n in idle})
        held = {(*holding, node.id) for node in nodes for holding in node.tiers.items()}
        assert held == {(*holding, name) for holding, names in self._holders.items() for name in names}
        assert all(self._holders.values()), "nobody holds it"
        for shortlist in self._shortlists:
            shortlist.validate()

    # ------------------------------------------------------------------------------------------------------ indexes

    def _refresh(self, node: Node) -> None:
        """Count it again and put it where it belongs; its few replicas are looked at, nobody else's."""
        node.num_free, node.num_evictable, node.num_busy, node.idle_since_s = _count(node)
        self._free.put(node.id, node.num_open, node.load_until_s)
        if node.num_evictable:
            self._idle.put(node.id, (node.num_free, node.num_free + node.num_evictable), node.idle_since_s)
        else:
            self._idle.discard(node.id)
        for shortlist in self._shortlists:
            shortlist.offer(node.id)

    def _file_state(self, replica: Replica) -> None:
        self._by_state.setdefault((replica.model, replica.state), {})[replica.id] = replica
        if replica.state is ReplicaState.READY:
            self._least_busy.put(replica.id, replica.model, len(replica.ongoing))
        else:
            self._least_busy.discard(replica.id)

    def _unfile_state(self, replica: Replica) -> None:
        key = (replica.model, replica.state)
        del self._by_state[key][replica.id]
        if not self._by_state[key]:
            del self._by_state[key]

    def _set_holder(self, old: Holding, new: Holding, node_id: str) -> None:
        if old[1] is not Tier.REMOTE:
            self._holders[old].discard(node_id)
            if not self._holders[old]:
                del self._holders[old]
            for shortlist in self._shortlists:
                shortlist.discard(old, node_id)
        if new[1] is not Tier.REMOTE:
            self._holders.setdefault(new, set()).add(node_id)
            for shortlist in self._shortlists:
                shortlist.add(new, node_id)

    def _fits_free(self, node_id: str, num_slots: int) -> bool:
        return self._nodes[node_id].num_open >= num_slots

    def _fits_idle(self, node_id: str, num_slots: int) -> bool:
        node = self._nodes[node_id]
        return node.num_free < num_slots <= node.num_free + node.num_evictable

    def _fits_busy(self, node_id: str, num_slots: int) -> bool:
        node = self._nodes[node_id]
        room = node.num_free + node.num_evictable
        return room < num_slots <= room + node.num_busy


def _count(node: Node) -> tuple[int, int, int, float]:
    """Its slots that are free, evictable and busy, and since when a replica is evictable."""
    used = evictable = busy = 0
    since_s = inf
    for replica in node.replicas.values():
        used += replica.num_slots
        evictable_since_s = _evictable_since_s(replica)
        if evictable_since_s is not None:
            evictable += replica.num_slots
            since_s = min(since_s, evictable_since_s)
        elif replica.state is ReplicaState.READY and not replica.is_pinned:
            busy += replica.num_slots
    free = node.num_slots - used
    return (free, 0, 0, inf) if node.is_cordoned else (free, evictable, busy, since_s)


def _evictable_since_s(replica: Replica) -> float | None:
    """Since when a start could have its slots; None if it may not."""
    if replica.state is ReplicaState.ORDERED:
        return replica.unwanted_since_s
    return None if replica.is_pinned else replica.idle_since_s
