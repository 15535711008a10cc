"""Random operations on the picture of nodes and replicas, and what it finds held against a look at everything."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sllm_vllm.router.core.cluster import NEXT, Cluster, Node, Replica, ReplicaState
from sllm_vllm.router.core.facts import Tier

NUM_EXAMPLES = 100
STEPS_MAX = 50

choice = st.integers(0, 1 << 16)
SLOTS = {"a": 1, "b": 2, "c": 3}
models = st.sampled_from(sorted(SLOTS))
others = st.sampled_from((0, 0, 0, 0, 0, 1, -1))
"""Slots more than a model needs as a rule: an index is for one number of slots, until another one is asked for."""
tiers = st.sampled_from(Tier)
states = st.sampled_from([*ReplicaState, ReplicaState.READY, ReplicaState.READY, ReplicaState.READY])


class World(RuleBasedStateMachine):
    """Anything an owner may do, in any order."""

    @initialize()
    def start(self) -> None:
        self.cluster = Cluster()
        self.now_s = 0.0
        self.num_made = 0
        for num_slots in (1, 2, 3, 4):
            self.add_node(num_slots)
        for node in self.cluster.nodes:
            self.cluster.set_residency(node, {"a": Tier.HOST, "b": Tier.HOST, "c": Tier.DISK})

    def pick(self, names: Iterable[str], number: int) -> str | None:
        ordered = sorted(names)
        return ordered[number % len(ordered)] if ordered else None

    def new_name(self, kind: str) -> str:
        self.num_made += 1
        return f"{kind}{self.num_made}"

    @rule(num_slots=st.integers(1, 4))
    def more_nodes(self, num_slots: int) -> None:
        self.add_node(num_slots)

    def add_node(self, num_slots: int) -> None:
        self.cluster.add_node(self.new_name("n"), num_slots)

    @rule(number=choice, chance=st.integers(0, 3))
    def remove_node(self, number: int, chance: int) -> None:
        node = self.pick(self.cluster.nodes, number)
        if node is not None and chance == 0:
            self.cluster.remove_node(node)

    @rule(number=choice, model=models, tier=tiers)
    def set_tier(self, number: int, model: str, tier: Tier) -> None:
        node = self.pick(self.cluster.nodes, number)
        if node is not None:
            self.cluster.set_tier(node, model, tier)

    @rule(number=choice, residency=st.dictionaries(models, tiers))
    def report(self, number: int, residency: dict[str, Tier]) -> None:
        node = self.pick(self.cluster.nodes, number)
        if node is not None:
            self.cluster.set_residency(node, residency)

    @rule(number=choice, seconds=st.integers(0, 3))
    def extend_load(self, number: int, seconds: int) -> None:
        node = self.pick(self.cluster.nodes, number)
        if node is not None:
            self.cluster.extend_load(node, self.now_s, float(seconds))

    @rule(number=choice, seconds=st.integers(0, 3))
    def set_load_until(self, number: int, seconds: int) -> None:
        node = self.pick(self.cluster.nodes, number)
        if node is not None:
            self.cluster.set_load_until(node, float(seconds))

    @rule(number=choice, model=models, num_slots=st.integers(1, 3), state=states)
    def add_replica(self, number: int, model: str, num_slots: int, state: ReplicaState) -> None:
        node = self.pick((n.id for n in self.cluster.nodes.values() if n.num_free >= num_slots), number)
        if node is not None:
            idle_since_s = self.now_s if state is ReplicaState.READY else None
            self.cluster.add_replica(
                Replica(self.new_name("r"), model, node, num_slots=num_slots, state=state, idle_since_s=idle_since_s)
            )

    @rule(number=choice, which=choice)
    def set_state(self, number: int, which: int) -> None:
        replica = self.pick(self.cluster.replicas, number)
        if replica is not None:
            after = sorted(NEXT[self.cluster.replicas[replica].state], key=lambda state: state.value)
            if after:
                self.cluster.set_state(replica, after[which % len(after)], self.now_s)

    @rule(number=choice, is_pinned=st.sampled_from((False, False, True)))
    def set_pinned(self, number: int, is_pinned: bool) -> None:
        replica = self.pick(self.cluster.replicas, number)
        if replica is not None:
            self.cluster.set_pinned(replica, is_pinned)

    @rule(number=choice)
    def remove_replica(self, number: int) -> None:
        replica = self.pick(self.cluster.replicas, number)
        if replica is not None:
            self.cluster.remove_replica(replica)

    @rule(number=choice)
    def begin_request(self, number: int) -> None:
        ready = (one.id for one in self.cluster.replicas.values() if one.state is ReplicaState.READY)
        replica = self.pick(ready, number)
        if replica is not None:
            self.cluster.begin_request(replica, self.new_name("q"), prefix="p", now_s=self.now_s)

    @rule(number=choice)
    def end_request(self, number: int) -> None:
        replica = self.pick((one.id for one in self.cluster.replicas.values() if one.ongoing), number)
        if replica is not None:
            self.cluster.end_request(replica, min(self.cluster.replicas[replica].ongoing), self.now_s)

    @rule(seconds=st.integers(0, 2))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    # ---------------------------------------------------------------------------------------- what must be true

    def by_speed(self, nodes: Iterable[Node], model: str) -> list[str]:
        """The fastest first, by looking at all."""
        return [
            node.id for node in sorted(nodes, key=lambda n: (n.tiers.get(model, Tier.REMOTE), n.load_until_s, n.id))
        ]

    def slots_of(self, node: Node, *, is_idle: bool) -> int:
        ready = [one for one in node.replicas.values() if one.state is ReplicaState.READY and not one.is_pinned]
        return sum(one.num_slots for one in ready if (not one.ongoing) is is_idle)

    @rule(model=models, more=others, k=st.integers(2, 5))
    def candidates_have_the_best(self, model: str, more: int, k: int) -> None:
        num_slots = SLOTS[model] + more
        fit = self.by_speed((n for n in self.cluster.nodes.values() if free_of(n) >= num_slots), model)
        found = self.cluster.candidates(model, num_slots, k)
        assert len(found) == len(set(found)) <= 2 * k
        assert set(found) <= set(fit)
        assert fit[:1] == found[:1] or self.cluster.tier(fit[0], model) is Tier.REMOTE
        assert set(fit[:1]) <= set(found)
        soonest = sorted(fit, key=lambda node: (self.cluster.load_until_s(node), node))
        assert set(soonest[:k]) <= set(found)

    @rule(model=models, more=others, k=st.integers(2, 5))
    def evictable_have_the_best(self, model: str, more: int, k: int) -> None:
        num_slots = SLOTS[model] + more
        nodes = [
            node
            for node in self.cluster.nodes.values()
            if free_of(node) < num_slots <= free_of(node) + self.slots_of(node, is_idle=True)
        ]
        found = self.cluster.evictable(model, num_slots, k)
        assert len(found) == len(set(found)) <= k
        assert set(found) <= {node.id for node in nodes}
        assert len(found) == min(k, len(nodes))
        holders = self.by_speed((node for node in nodes if model in node.tiers), model)
        assert found[:1] == holders[:1] or not holders
        longest = min(nodes, key=lambda node: (since_of(node), node.id), default=None)
        assert longest is None or longest.id in found

    @rule(model=models, more=others, k=st.integers(2, 5))
    def movable_have_the_best(self, model: str, more: int, k: int) -> None:
        num_slots = SLOTS[model] + more
        nodes = []
        for node in self.cluster.nodes.values():
            room = free_of(node) + self.slots_of(node, is_idle=True)
            if model in node.tiers and room < num_slots <= room + self.slots_of(node, is_idle=False):
                nodes.append(node)
        found = self.cluster.movable(model, num_slots, k)
        assert set(found) <= {node.id for node in nodes}
        assert len(found) == min(k, len(nodes))
        assert found[:1] == self.by_speed(nodes, model)[:1]

    @invariant()
    def indexes_are_right(self) -> None:
        self.cluster.validate()


def free_of(node: Node) -> int:
    return node.num_slots - sum(replica.num_slots for replica in node.replicas.values())


def since_of(node: Node) -> float:
    times = [r.idle_since_s for r in node.replicas.values() if r.idle_since_s is not None and not r.is_pinned]
    return min(times)


def test_random_operations_keep_every_index() -> None:
    run_state_machine_as_test(
        World, settings=settings(max_examples=NUM_EXAMPLES, stateful_step_count=STEPS_MAX, deadline=None)
    )
