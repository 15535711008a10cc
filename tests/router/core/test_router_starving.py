"""Models that wait too long for slots: a node is freed for them, nobody overtakes, and nobody ends in vain."""

from __future__ import annotations

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import DrainAsked
from sllm_vllm.router.core.facts import ModelSpec, RouterLimits, ScalingLimits
from sllm_vllm.router.core.model_state import CoreState, ModelState
from sllm_vllm.router.core.placement import Room, find_room
from sllm_vllm.router.core.rules import RuleBook
from tests.router.core.router_bench import RouterBench
from tests.support.cases import every_case

STARVE_S = 30.0


def bench_of(*nodes: int) -> RouterBench:
    bench = RouterBench(RouterLimits(scaling=ScalingLimits(starve_s=STARVE_S)))
    for index, num_slots in enumerate(nodes):
        bench.node(f"n{index}", num_slots)
    return bench


def draining(bench: RouterBench) -> list[str]:
    return [name for name, one in bench.core.cluster.replicas.items() if one.state is ReplicaState.DRAINING]


def test_a_slot_that_is_drained_goes_to_who_starved_though_the_others_still_wait() -> None:
    """Of two models on one slot, one with requests that never end, both are served."""
    bench = bench_of(1)
    bench.deploy("loud", queue_s_max=1000.0, ongoing_max=1)
    bench.deploy("quiet", queue_s_max=1000.0)
    bench.ask("loud")
    bench.start()
    bench.ask("quiet")
    for _ in range(4):
        bench.ask("loud")
    bench.wait(STARVE_S + 1)
    (drained,) = draining(bench)
    bench.ask("loud")
    bench.end(next(iter(bench.books.running)))
    bench.stopped(drained)
    assert [order.model for order in bench.starting.values()] == ["quiet"]


def test_slots_are_collected_on_one_node_for_a_model_that_takes_several() -> None:
    bench = bench_of(2, 2)
    for name in "abcd":
        bench.deploy(name, queue_s_max=1000.0)
        bench.ask(name)
        bench.start()
    bench.deploy("wide", accelerators=2, queue_s_max=1000.0)
    bench.ask("wide")
    bench.wait(STARVE_S + 1)
    victims = draining(bench)
    (node,) = {bench.core.cluster.replicas[name].node for name in victims}
    assert len(victims) == 2
    for name in "abcd":
        bench.ask(name)
    for victim in victims:
        while bench.core.cluster.replicas[victim].ongoing:
            bench.end(next(iter(bench.core.cluster.replicas[victim].ongoing)))
        bench.stopped(victim)
    assert [(order.model, order.node) for order in bench.starting.values()] == [("wide", node)]


def test_nobody_ends_for_a_model_that_fits_nowhere_and_it_stands_in_nobodys_way() -> None:
    bench = bench_of(1)
    bench.deploy("huge", accelerators=8, priority=5, queue_s_max=1000.0)
    bench.deploy("a", queue_s_max=1000.0)
    bench.deploy("b", queue_s_max=1000.0)
    request = bench.ask("a")
    bench.start()
    bench.ask("huge")
    bench.wait(STARVE_S + 1)
    bench.ask("b")
    bench.wait(1.0)
    assert not draining(bench)
    bench.end(request)
    bench.stopped()
    assert [order.model for order in bench.starting.values()] == ["b"]


def test_a_model_that_fits_nowhere_is_started_when_a_large_node_comes() -> None:
    bench = bench_of(1)
    bench.deploy("huge", accelerators=8, queue_s_max=1000.0)
    bench.ask("huge")
    bench.wait(STARVE_S + 1)
    assert not bench.starting
    bench.node("large", 8)
    assert [order.model for order in bench.starting.values()] == ["huge"]


def test_nobody_ends_where_what_is_kept_leaves_too_little_room() -> None:
    bench = bench_of(2)
    bench.deploy("kept", min_replicas=1)
    bench.start()
    bench.deploy("busy", queue_s_max=1000.0)
    bench.ask("busy")
    bench.start()
    bench.deploy("wide", accelerators=2, queue_s_max=1000.0)
    bench.deploy("small", queue_s_max=1000.0)
    bench.ask("wide")
    bench.wait(STARVE_S + 1)
    bench.ask("small")
    bench.wait(1.0)
    assert not draining(bench)
    bench.end(next(iter(bench.books.running)))
    bench.stopped()
    assert [order.model for order in bench.starting.values()] == ["small"]


def test_one_after_the_other_has_its_turn() -> None:
    bench = bench_of(1, 1)
    for name in ("a", "b"):
        bench.deploy(name, queue_s_max=1000.0)
        bench.ask(name)
        bench.start()
    for name in ("first", "second"):
        bench.deploy(name, queue_s_max=1000.0)
        bench.ask(name)
        bench.now_s += 1.0
    bench.wait(STARVE_S + 1)
    (drained,) = draining(bench)
    bench.wait(1.0)
    assert draining(bench) == [drained]
    bench.end(next(iter(bench.core.cluster.replicas[drained].ongoing)))
    bench.stopped(drained)
    assert [order.model for order in bench.starting.values()] == ["first"]
    bench.wait(1.0)
    assert len(draining(bench)) == 1


def test_a_slot_that_comes_free_sooner_is_taken_and_what_drained_goes_on() -> None:
    bench = bench_of(1, 1)
    for name in ("a", "b"):
        bench.deploy(name, queue_s_max=1000.0, ongoing_max=2)
        bench.ask(name)
        bench.start()
    bench.deploy("late", queue_s_max=1000.0)
    bench.ask("late")
    bench.wait(STARVE_S + 1)
    (drained,) = draining(bench)
    model = bench.core.cluster.replicas[drained].model
    more = bench.ask(model)
    assert more in bench.books.waiting
    (other,) = (name for name in bench.ready if name != drained)
    bench.end(next(iter(bench.core.cluster.replicas[other].ongoing)))
    bench.stopped(other)
    assert [order.model for order in bench.starting.values()] == ["late"]
    assert not draining(bench)
    assert bench.books.running[more] == drained


@every_case("is_asked", [False, True])
def test_what_drained_for_a_deleted_model_goes_on_unless_an_operator_drains_it(is_asked: bool) -> None:
    bench = bench_of(1)
    _occupied(bench)
    bench.deploy("late", queue_s_max=1000.0)
    bench.ask("late")
    bench.wait(STARVE_S + 1)
    (drained,) = draining(bench)
    if is_asked:
        bench.tell(DrainAsked(drained))
    bench.delete("late")
    assert draining(bench) == ([drained] if is_asked else [])


@every_case("how", ["gone", "late"])
def test_what_drains_for_nobody_any_more_goes_on(how: str) -> None:
    bench = bench_of(1)
    bench.deploy("busy", queue_s_max=1000.0, ongoing_max=2)
    bench.ask("busy")
    bench.start()
    bench.deploy("late", queue_s_max=STARVE_S + 10.0)
    late = bench.ask("late")
    bench.wait(STARVE_S + 1)
    assert len(draining(bench)) == 1
    if how == "gone":
        bench.leave(late)
    else:
        bench.wait(STARVE_S)
    bench.wait(1.0)
    assert draining(bench) == []
    assert bench.core.scaling.pending.all() == []
    second = bench.ask("busy")
    assert bench.core.requests[second].replica is not None


def test_deleted_models_do_not_stand_in_the_way_of_those_that_wait() -> None:
    bench = bench_of(1)
    request = _occupied(bench)
    for index in range(8):
        bench.deploy(f"gone{index}", priority=1)
        bench.ask(f"gone{index}")
    bench.deploy("a")
    bench.ask("a")
    for index in range(8):
        bench.delete(f"gone{index}")
    bench.end(request)
    bench.stopped()
    assert [order.model for order in bench.starting.values()] == ["a"]


def _occupied(bench: RouterBench) -> str:
    bench.deploy("first")
    request = bench.ask("first")
    bench.start()
    return request


@every_case(
    "num_slots, expected",
    [(1, Room("y", ("y1",), 1)), (2, Room("y", ("y1", "y2"), 3)), (3, Room("z", ("z1",), 4)), (4, None)],
)
def test_the_fewest_requests_are_in_the_way(num_slots: int, expected: Room | None) -> None:
    cluster = Cluster()
    for node, sizes in {"x": {"x1": (2, 9)}, "y": {"y1": (1, 1), "y2": (1, 2)}, "z": {"z1": (3, 4)}}.items():
        cluster.add_node(node, sum(size for size, _ in sizes.values()))
        for name, (size, num_requests) in sizes.items():
            cluster.add_replica(Replica(name, f"model-{name}", node, num_slots=size))
            cluster.set_state(name, ReplicaState.READY, 1.0)
            for number in range(num_requests):
                cluster.begin_request(name, f"{name}-{number}", prefix="", now_s=1.0)
    core_state = CoreState()
    rules = RuleBook(RouterLimits(), core_state, cluster=cluster, estimator=Estimator())
    assert find_room(rules, "new", num_slots) == expected
    for replica in cluster.replicas.values():
        core_state.models[replica.model] = ModelState(ModelSpec(replica.model, min_replicas=1))
    assert find_room(rules, "new", num_slots) is None
    cluster.validate()


def test_who_waits_behind_requests_that_are_longer_than_they_used_to_be_gets_another_replica() -> None:
    """At first it would be there too late for a queue that is over in a moment."""
    bench = bench_of(2)
    bench.deploy("m", ongoing_max=1, target_ongoing=1, max_replicas=2)
    short = bench.ask("m")
    bench.start()
    bench.wait(0.1)
    bench.end(short)
    bench.ask("m")
    bench.ask("m")
    bench.wait(0.5)
    assert not bench.starting
    bench.wait(0.6)  # longer than a start takes
    assert [order.model for order in bench.starting.values()] == ["m"]
