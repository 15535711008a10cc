"""The router's view of nodes and replicas, with the indexes that make decisions fast. Pure; owned by the core."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from types import MappingProxyType

from sllm_vllm.router.core.facts import Tier
from sllm_vllm.router.core.shortlist import Holding, Ranking, Shortlist

ONGOING_SLACK = 1
"""How many requests more than the least busy replica one may have and still be chosen for its prefix cache."""


PREFIXES_MAX = 32
"""Prefixes remembered per replica; the oldest are forgotten, as in its prefix cache."""


def note_prefix(prefixes: dict[str, float], prefix: str, now_s: float) -> None:
    """Record a request's prefix as the most recent one, dropping the least recent if there are too many."""
    prefixes.pop(prefix, None)
    prefixes[prefix] = now_s
    if len(prefixes) > PREFIXES_MAX:
        del prefixes[next(iter(prefixes))]


class ReplicaState(Enum):
    """A replica's lifecycle state, as the router sees it."""

    ORDERED = "ordered"
    """Its agent was told to start it; it waits for slots or is starting."""
    READY = "ready"
    DRAINING = "draining"
    """It gets no new requests and is stopped when its last one ends."""
    STOPPING = "stopping"
    """Its agent was told to stop it; it keeps its slots until it is removed."""


NEXT: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.ORDERED: frozenset({ReplicaState.READY, ReplicaState.STOPPING}),
    ReplicaState.READY: frozenset({ReplicaState.DRAINING, ReplicaState.STOPPING}),
    ReplicaState.DRAINING: frozenset({ReplicaState.READY, ReplicaState.STOPPING}),
    ReplicaState.STOPPING: frozenset(),
}


@dataclass(slots=True)
class Replica:
    """One copy of a model, running or ordered. Once added, its indexed fields are changed only by ``Cluster``."""

    id: str
    model: str
    node: str
    generation: int = 0
    lineage: int = 0
    num_slots: int = 1
    state: ReplicaState = ReplicaState.ORDERED
    state_since_s: float = 0.0
    ongoing: set[str] = field(default_factory=set)
    """Ids of its requests, including those that are moving here."""
    ordered_s: float = 0.0
    ready_at_s: float = 0.0
    """When it is predicted to be ready."""
    ready_s: float | None = None
    """When it became ready; None until then."""
    idle_since_s: float | None = None  # None while it is busy or not READY
    prefixes: dict[str, float] = field(default_factory=dict)
    """Prefixes of its requests and when each was last seen, most recent last; at most ``PREFIXES_MAX``."""
    is_pinned: bool = False
    """Must not be evicted: it is one of the replicas its model must keep."""
    unwanted_since_s: float | None = None
    """Set while it is ORDERED and no request waits for it: another start may take its slots."""
    is_movable: bool = False
    """Requests can move to and from it. Not indexed, so it may be set directly."""
    is_unmovable: bool = False
    """Its engine was asked and cannot move requests."""


def choose_replica(candidates: Iterable[Replica], prefix: str) -> Replica | None:
    """Choose which of a model's ready replicas gets a request.

    It is the one with the fewest requests, or one nearly as free that has the prefix cached.
    All candidates must have room; without candidates, returns None. Among those within ``ONGOING_SLACK`` requests of
    the fewest, prefers the one that had ``prefix`` most recently, then fewer requests, then the smaller id. An empty
    prefix is in no cache.
    """
    counted = [(len(candidate.ongoing), candidate) for candidate in candidates]
    if not counted:
        return None
    num_most = min(num for num, _ in counted) + ONGOING_SLACK
    never_s = float("-inf")

    def rank(entry: tuple[int, Replica]) -> tuple[float, int, str]:
        num, candidate = entry
        seen_s = candidate.prefixes.get(prefix, never_s) if prefix else never_s
        return -seen_s, num, candidate.id

    return min((entry for entry in counted if entry[0] <= num_most), key=rank)[1]


@dataclass(slots=True)
class Node:
    """A machine. Changed only by ``Cluster``."""

    id: str
    num_slots: int
    is_warm: bool = True
    """Whether its next engine is forked from a warm parent process."""
    warm_at_s: float = 0.0
    """When that parent has finished its imports; earlier starts wait for it."""
    load_until_s: float = 0.0
    """When the loads ordered so far end. They run one after another."""
    tiers: dict[str, Tier] = field(default_factory=dict)
    """Models in HOST or DISK; all others are REMOTE."""
    replicas: dict[str, Replica] = field(default_factory=dict)
    num_free: int = 0
    num_evictable: int = 0
    """Slots of replicas that are idle and not pinned, or whose start is unwanted; 0 if the node is cordoned."""
    num_busy: int = 0
    """Slots of replicas that are READY, have requests and are not pinned; 0 if the node is cordoned."""
    idle_since_s: float = inf
    """Since when its longest-idle evictable replica is evictable; infinite if there is none."""
    is_cordoned: bool = False
    """No replica may start on it."""

    def start_wait_s(self, now_s: float) -> float:
        """How long a start ordered now waits for earlier loads or for the warm parent process."""
        return max(0.0, self.load_until_s - now_s, self.warm_at_s - now_s if self.is_warm else 0.0)

    @property
    def num_open(self) -> int:
        """Free slots that a start may use; -1 if the node is cordoned."""
        return -1 if self.is_cordoned else self.num_free


class Cluster:
    """Nodes, their replicas, and which nodes are candidates for a start.

    A slot belongs to one replica, whatever its state, until that replica is removed. A node's replicas never hold more
    slots than the node has.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._replicas: dict[str, Replica] = {}
        self._by_state: dict[tuple[str, ReplicaState], dict[str, Replica]] = {}
        self._draining: dict[str, None] = {}  # models with DRAINING replicas, in the order in which they got them
        self._least_busy: Ranking[str] = Ranking()  # READY replicas: by model; key: number of requests
        self._free: Ranking[int] = Ranking()  # nodes: by free slots; key: end of loads
        self._idle: Ranking[tuple[int, int]] = Ranking()  # nodes: by (free, free + evictable); key: idle since
        self._holders: dict[Holding, set[str]] = {}
        self._free_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_free)
        self._idle_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_idle)
        self._busy_holders = Shortlist(self._holders, rank=self.load_until_s, fits=self._fits_busy)
        self._shortlists = (self._free_holders, self._idle_holders, self._busy_holders)
        self.nodes: Mapping[str, Node] = MappingProxyType(self._nodes)
        self.replicas: Mapping[str, Replica] = MappingProxyType(self._replicas)

    # ------------------------------------------------------------------------------------------------------- nodes

    def add_node(self, node_id: str, num_slots: int, *, is_warm: bool = True) -> None:
        """Add a node with no replicas."""
        assert node_id not in self._nodes, f"node {node_id} is there already"
        self._nodes[node_id] = node = Node(node_id, num_slots, is_warm)
        self._refresh(node)

    def remove_node(self, node_id: str) -> list[str]:
        """Remove a node with its replicas, and return their ids."""
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
        """Set whether the node's next engine is forked from a warm parent process, and when that parent is ready."""
        node = self._nodes[node_id]
        node.is_warm, node.warm_at_s = is_warm, at_s

    def set_cordoned(self, node_id: str, is_cordoned: bool) -> None:
        """Set whether starts on the node are forbidden; running replicas stay."""
        self._nodes[node_id].is_cordoned = is_cordoned
        self._refresh(self._nodes[node_id])

    def num_slots(self, node_id: str) -> int:
        """Return the node's total number of slots."""
        return self._nodes[node_id].num_slots

    def free_slots(self, node_id: str) -> int:
        """Return the number of the node's slots that no replica holds."""
        return self._nodes[node_id].num_free

    # --------------------------------------------------------------------------------------------------- residency

    def tier(self, node_id: str, model: str) -> Tier:
        """Return the tier in which a start of ``model`` on the node would find its weights."""
        return self._nodes[node_id].tiers.get(model, Tier.REMOTE)

    def set_tier(self, node_id: str, model: str, tier: Tier) -> None:
        """Record that ``tier`` is the fastest in which the node has the model."""
        tiers = self._nodes[node_id].tiers
        old = tiers.pop(model, Tier.REMOTE)
        if tier is not Tier.REMOTE:
            tiers[model] = tier
        if tier is not old:
            self._set_holder((model, old), (model, tier), node_id)

    def set_residency(self, node_id: str, tiers: Mapping[str, Tier]) -> None:
        """Replace the node's residency. Models not in ``tiers`` become REMOTE."""
        old = self._nodes[node_id].tiers
        for model in [model for model in old if model not in tiers]:
            self.set_tier(node_id, model, Tier.REMOTE)
        for model, tier in tiers.items():
            if old.get(model, Tier.REMOTE) is not tier:
                self.set_tier(node_id, model, tier)

    # ------------------------------------------------------------------------------------------------------- loads

    def load_until_s(self, node_id: str) -> float:
        """Return when the loads ordered so far end; in the past if none is running."""
        return self._nodes[node_id].load_until_s

    def extend_load(self, node_id: str, now_s: float, seconds: float) -> float:
        """Queue one more load on the node and return when it ends."""
        until_s = max(now_s, self._nodes[node_id].load_until_s) + seconds
        self.set_load_until(node_id, until_s)
        return until_s

    def set_load_until(self, node_id: str, until_s: float) -> None:
        """Correct the end of the node's loads, after one failed or took other than the predicted time."""
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
        """Add a replica that was ordered or found. Its node must have enough free slots.

        The caller sets ``idle_since_s`` if the replica is READY and idle.
        """
        node = self._nodes[replica.node]
        assert replica.id not in self._replicas, f"replica {replica.id} is there already"
        assert replica.num_slots <= node.num_free, f"no room for {replica.id} on {node.id}"
        self._replicas[replica.id] = node.replicas[replica.id] = replica
        self._file_state(replica)
        self._refresh(node)

    def remove_replica(self, replica_id: str) -> None:
        """Remove a replica and free its slots."""
        replica = self._replicas.pop(replica_id)
        node = self._nodes[replica.node]
        del node.replicas[replica_id]
        self._unfile_state(replica)
        self._least_busy.discard(replica_id)
        self._refresh(node)

    def set_state(self, replica_id: str, state: ReplicaState, now_s: float) -> None:
        """Change a replica's state. ``NEXT`` must allow the change; setting the current state does nothing."""
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
        """Set whether a replica must be kept. A node stays a candidate if it has other replicas to evict."""
        replica = self._replicas[replica_id]
        if replica.is_pinned is not is_pinned:
            replica.is_pinned = is_pinned
            self._refresh(self._nodes[replica.node])

    def set_unwanted(self, replica_id: str, is_unwanted: bool, now_s: float) -> None:
        """Set whether an ORDERED replica is unwanted: no request waits for it."""
        replica = self._replicas[replica_id]
        assert replica.state is ReplicaState.ORDERED, f"{replica_id} is {replica.state.name}"
        if (replica.unwanted_since_s is not None) is not is_unwanted:
            replica.unwanted_since_s = now_s if is_unwanted else None
            self._refresh(self._nodes[replica.node])

    def replicas_of(self, model: str, state: ReplicaState | None = None) -> tuple[Replica, ...]:
        """Return the model's replicas in ``state``, in the order they entered it; without a state, all of them."""
        states = ReplicaState if state is None else (state,)
        return tuple(replica for one in states for replica in self._by_state.get((model, one), {}).values())

    @property
    def draining(self) -> Collection[str]:
        """Models with DRAINING replicas, in the order in which they got them."""
        return self._draining

    def least_busy(self, model: str, num_max: int) -> list[Replica]:
        """Return up to ``num_max`` READY replicas of the model, fewest requests first, then by id."""
        return [self._replicas[name] for name in self._least_busy.first((model,), num_max)]

    def evictable_on(self, node_id: str) -> list[Replica]:
        """Return the node's replicas that are idle and not pinned, or whose start is unwanted."""
        replicas = self._nodes[node_id].replicas.values()
        return [one for one in replicas if _evictable_since_s(one) is not None]

    # ---------------------------------------------------------------------------------------------------- requests

    def begin_request(self, replica_id: str, request_id: str, *, prefix: str, now_s: float) -> None:
        """Give a request a place on a replica. An empty ``prefix`` means that it is unknown."""
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
        """Release a request's place on a replica."""
        replica = self._replicas[replica_id]
        replica.ongoing.remove(request_id)
        if replica.state is ReplicaState.READY:
            self._least_busy.put(replica_id, replica.model, len(replica.ongoing))
            if not replica.ongoing:
                replica.idle_since_s = now_s
                self._refresh(self._nodes[replica.node])

    # --------------------------------------------------------------------------------------------------- candidates

    def candidates(self, model: str, num_slots: int, k: int) -> list[str]:
        """Return at most 2 k nodes with ``num_slots`` free: k that have the model, then k whose loads end first."""
        soon = self._free.first([free for free in self._free.groups() if free >= num_slots], k)
        return list(dict.fromkeys([*self._free_holders.fastest(model, num_slots, k), *soon]))

    def evictable(self, model: str, num_slots: int, k: int) -> list[str]:
        """Return at most k nodes whose free slots are too few, but suffice with those of evictable replicas.

        Half of them have the model, if that many exist; then come the nodes with the longest-idle replicas.
        """
        holders = self._idle_holders.fastest(model, num_slots, max(1, k // 2))
        groups = [(free, room) for free, room in self._idle.groups() if free < num_slots <= room]
        return list(dict.fromkeys([*holders, *self._idle.first(groups, k)]))[:k]

    def movable(self, model: str, num_slots: int, k: int) -> list[str]:
        """Return at most k nodes that have the model and have room only if busy replicas end, too."""
        return self._busy_holders.fastest(model, num_slots, k)

    # ---------------------------------------------------------------------------------------------------- invariants

    def validate(self) -> None:
        """Assert that no slot is used twice and that every index agrees with a recount."""
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
        assert set(self._draining) == {model for model, state in self._by_state if state is ReplicaState.DRAINING}
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
        assert all(self._holders.values()), "a checkpoint without a holder"
        for shortlist in self._shortlists:
            shortlist.validate()

    # ------------------------------------------------------------------------------------------------------ indexes

    def _refresh(self, node: Node) -> None:
        """Recount the node's slots and update its place in the indexes. Looks only at the node's own replicas."""
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
        if replica.state is ReplicaState.DRAINING:
            self._draining[replica.model] = None

    def _unfile_state(self, replica: Replica) -> None:
        key = (replica.model, replica.state)
        del self._by_state[key][replica.id]
        if not self._by_state[key]:
            del self._by_state[key]
            if replica.state is ReplicaState.DRAINING:
                del self._draining[replica.model]

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
    """Return the node's free, evictable and busy slots, and since when its longest-idle replica is evictable."""
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
    """Return since when a start could take the replica's slots; None if it may not."""
    if replica.state is ReplicaState.ORDERED:
        return replica.unwanted_since_s
    return None if replica.is_pinned else replica.idle_since_s
