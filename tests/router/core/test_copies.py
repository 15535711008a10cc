"""When a hot checkpoint is copied to another node: from whom, to whom, and how many at once."""

from __future__ import annotations

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.events import CopyCheckpoint
from sllm_vllm.router.core.facts import CopyLimits, ModelSpec, Tier
from sllm_vllm.router.core.foresight import LOOK_S, Copies
from sllm_vllm.router.core.model_state import ModelState
from tests.support.cases import every_case

LIMITS = CopyLimits(holders_max=3, at_once_max=2, copy_s_max=100.0)


class Bench:
    """Nodes with two slots each; models with eight requests to a replica."""

    def __init__(self, num_nodes: int, limits: CopyLimits = LIMITS) -> None:
        self.cluster = Cluster()
        self.models: dict[str, ModelState] = {}
        self.copies = Copies(self.cluster, self.models, limits)
        self.now_s = 0.0
        for number in range(num_nodes):
            self.cluster.add_node(f"n{number}", 2)

    def add(self, model: str, *holders: str, ongoing: int = 4, accelerators: int = 1) -> None:
        """One with a replica on the first of its holders."""
        self.models[model] = ModelState(ModelSpec(model, accelerators=accelerators), num_ongoing=ongoing)
        for node in holders:
            self.cluster.set_tier(node, model, Tier.DISK)
        self.add_replica(model, holders[0])

    def add_replica(self, model: str, node: str) -> None:
        name = f"{model}-{len(self.cluster.replicas)}"
        self.cluster.add_replica(
            Replica(
                id=name,
                model=model,
                node=node,
                generation=0,
                lineage=0,
                num_slots=1,
                state_since_s=0.0,
                ordered_s=0.0,
                ready_at_s=0.0,
            )
        )
        self.cluster.set_state(name, ReplicaState.READY, 0.0)

    def look(self, *models: str) -> list[CopyCheckpoint]:
        """After requests for these, at the next look."""
        for model in models or self.models:
            self.copies.asked(model)
        self.now_s += LOOK_S
        return self.copies.due(self.now_s)


def test_a_hot_model_gets_one_holder_more_than_it_has_replicas() -> None:
    bench = Bench(4)
    bench.add("m", "n0")
    assert bench.look() == [CopyCheckpoint("m", "n0", "n1")]
    bench.cluster.set_tier("n1", "m", Tier.DISK)
    assert bench.look() == []
    bench.add_replica("m", "n1")
    assert bench.look() == []  # as many requests are fewer for each of them
    bench.models["m"].num_ongoing = 8
    assert bench.look() == [CopyCheckpoint("m", "n0", "n2")]
    bench.cluster.set_tier("n2", "m", Tier.DISK)
    bench.add_replica("m", "n2")
    bench.models["m"].num_ongoing = 24
    assert bench.look() == []  # three are the most


@every_case("ongoing", [0, 3])
def test_one_that_is_not_hot_is_not_copied(ongoing: int) -> None:
    bench = Bench(2)
    bench.add("m", "n0", ongoing=ongoing)
    assert bench.look() == []


def test_one_that_nobody_asked_for_lately_is_not_looked_at() -> None:
    bench = Bench(2)
    bench.add("m", "n0")
    bench.now_s += LOOK_S
    assert bench.copies.due(bench.now_s) == []


def test_looks_are_seldom() -> None:
    bench = Bench(3)
    bench.add("m", "n0")
    assert len(bench.look()) == 1
    bench.cluster.set_tier("n1", "m", Tier.DISK)
    bench.add("k", "n2")
    bench.copies.asked("k")
    assert bench.copies.due(bench.now_s + LOOK_S / 2) == []
    assert bench.copies.due(bench.now_s + LOOK_S) == [CopyCheckpoint("k", "n2", "n1")]


def test_a_node_sends_and_receives_one_at_a_time() -> None:
    bench = Bench(3)
    for model in ("a", "b"):
        bench.add(model, "n0")
    assert bench.look() == [CopyCheckpoint("a", "n0", "n1")]
    assert bench.look() == []
    bench.cluster.set_tier("n1", "a", Tier.DISK)
    assert bench.look() == [CopyCheckpoint("b", "n0", "n2")]


def test_few_go_on_at_once_in_the_whole_cluster() -> None:
    bench = Bench(9)
    for number in range(4):
        bench.add(f"m{number}", f"n{number}")
    assert len(bench.look()) == LIMITS.at_once_max
    assert bench.look() == []


def test_one_that_never_comes_is_tried_again_after_a_while() -> None:
    bench = Bench(2)
    bench.add("m", "n0")
    assert len(bench.look()) == 1
    bench.now_s += LIMITS.copy_s_max - 2 * LOOK_S
    assert bench.look() == []
    assert bench.look() == [CopyCheckpoint("m", "n0", "n1")]


@every_case("lost", ["n0", "n1"])
def test_a_copy_ends_with_either_of_its_nodes(lost: str) -> None:
    bench = Bench(3)
    bench.add("m", "n0", "n2")
    bench.add_replica("m", "n2")
    bench.models["m"].num_ongoing = 16
    assert bench.look() == [CopyCheckpoint("m", "n0", "n1")]
    bench.cluster.remove_node(lost)
    bench.cluster.add_node("n3", 2)
    (copy,) = bench.look()
    assert copy.source in {"n0", "n2"} - {lost}


def test_nodes_that_are_left_or_too_small_get_none() -> None:
    bench = Bench(3)
    bench.add("m", "n0")
    bench.cluster.set_cordoned("n1", True)
    assert bench.look() == [CopyCheckpoint("m", "n0", "n2")]
    bench = Bench(3)
    bench.add("m", "n0", accelerators=3)
    assert bench.look() == []


def test_by_itself_nothing_is_copied() -> None:
    bench = Bench(3, CopyLimits())
    bench.add("m", "n0")
    assert bench.look() == []


def test_a_model_that_was_deleted_is_not_copied() -> None:
    bench = Bench(2)
    bench.add("m", "n0")
    bench.copies.asked("m")
    del bench.models["m"]
    assert bench.copies.due(LOOK_S) == []
