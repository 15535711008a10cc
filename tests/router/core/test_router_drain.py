"""Draining a node: nothing new starts there, what runs ends without harm, and it stays so until it is undrained."""

from __future__ import annotations

from sllm_vllm.router.core.events import DrainAsked, NodeJoined, NodeLost, NodeReported, Refusal, StartReplica
from sllm_vllm.router.core.facts import Term, Tier
from tests.router.core.router_bench import RouterBench


def node_of(bench: RouterBench, replica: str) -> str:
    return bench.core.cluster.replicas[replica].node


def test_nothing_starts_on_a_drained_node_though_the_model_lies_there() -> None:
    bench = RouterBench()
    bench.node("a", a=Tier.HOST)
    bench.node("b")
    bench.deploy("a")
    bench.drain("a")
    bench.ask("a")
    assert node_of(bench, next(iter(bench.starting))) == "b"


def test_a_request_that_runs_is_finished_and_the_next_one_goes_elsewhere() -> None:
    bench = RouterBench()
    bench.node("a", num_slots=1)
    bench.deploy("a")
    first = bench.ask("a")
    replica = bench.start()
    bench.node("b", num_slots=1)
    bench.drain("a")
    second = bench.ask("a")
    assert bench.books.running == {first: replica}
    other = bench.start()
    assert bench.books.running == {first: replica, second: other}
    assert node_of(bench, other) == "b"
    bench.end(first)
    assert bench.stopping == {replica: "a"}


def test_idle_replicas_end_at_once_and_those_that_are_kept_start_elsewhere() -> None:
    bench = RouterBench()
    bench.node("a", num_slots=2)
    bench.deploy("kept", min_replicas=1)
    bench.deploy("idle")
    kept = bench.start()
    request = bench.ask("idle")
    idle = bench.start()
    bench.end(request)
    bench.node("b")
    bench.drain("a")
    assert bench.stopping == {kept: "a", idle: "a"}
    assert [(order.model, order.node) for order in bench.starting.values()] == [("kept", "b")]


def test_a_start_under_way_is_called_off_and_made_elsewhere() -> None:
    bench = RouterBench()
    bench.node("a", a=Tier.HOST)
    bench.node("b")
    bench.deploy("a")
    request = bench.ask("a")
    (replica,) = bench.starting
    bench.drain("a")
    assert bench.stopping == {replica: "a"}
    other = bench.start()
    assert bench.books.running == {request: other}
    assert node_of(bench, other) == "b"


def test_a_start_that_waits_for_a_victim_is_called_off() -> None:
    bench = RouterBench()
    bench.node("a", num_slots=1)
    bench.deploy("old")
    bench.deploy("new")
    request = bench.ask("old")
    bench.start()
    bench.end(request)
    bench.ask("new")
    assert len(bench.core.scaling.pending.all()) == 1
    bench.drain("a")
    bench.stopped()
    assert not bench.core.scaling.pending.all()
    assert not bench.starting


def test_undrained_it_serves_who_waits_and_what_is_kept() -> None:
    bench = RouterBench()
    bench.node("a", num_slots=2)
    bench.drain("a")
    bench.deploy("kept", min_replicas=1)
    bench.deploy("asked")
    bench.ask("asked")
    assert not bench.starting
    bench.undrain("a")
    assert {order.model for order in bench.starting.values()} == {"kept", "asked"}


def test_a_node_that_comes_back_is_still_drained() -> None:
    bench = RouterBench()
    bench.node("a")
    bench.drain("a")
    bench.tell(NodeLost("a"))
    bench.node("a")
    bench.deploy("a", min_replicas=1)
    assert not bench.starting
    bench.undrain("a")
    assert len(bench.starting) == 1


def test_a_node_can_be_undrained_while_it_is_away() -> None:
    bench = RouterBench()
    bench.node("a")
    bench.drain("a")
    bench.tell(NodeLost("a"))
    bench.undrain("a")
    bench.node("a")
    bench.deploy("a", min_replicas=1)
    assert len(bench.starting) == 1


def test_no_checkpoint_is_read_ahead_on_a_drained_node() -> None:
    bench = RouterBench()
    bench.node("a", a=Tier.DISK)
    bench.deploy("a", keep_alive_s=0.0)
    for _ in range(2):
        request = bench.ask("a")
        bench.start()
        bench.end(request)
        bench.wait(100.0)
        bench.stopped()
    bench.drain("a")
    told = [action for _ in range(20) for action in bench.wait(10.0)]
    assert told == []


def test_draining_one_replica_leaves_its_node_open() -> None:
    bench = RouterBench()
    bench.node("a", num_slots=2)
    bench.deploy("a", min_replicas=1)
    replica = bench.start()
    bench.tell(DrainAsked(replica))
    assert bench.stopping == {replica: "a"}
    assert [order.node for order in bench.starting.values()] == ["a"]


def test_who_waits_for_a_drained_cluster_is_told_so() -> None:
    bench = RouterBench()
    bench.node("a")
    bench.deploy("a", queue_s_max=20.0)
    bench.drain("a")
    request = bench.ask("a")
    bench.wait(21.0)
    rejected = bench.books.rejected[request]
    assert rejected.why is Refusal.TOO_LATE
    assert rejected.reason == "it takes 1 slots, and no node that takes starts has as many"


def test_a_start_right_after_its_node_joined_is_planned_with_the_parent_that_imports() -> None:
    bench = RouterBench()
    bench.deploy("a", min_replicas=1)
    report = NodeReported("n", is_warm=True, warm_in_s=40.0)
    (action,) = bench.tell(NodeJoined("n", 1, report=report))
    assert isinstance(action, StartReplica)
    prediction = bench.core.scaling.predictions[action.replica]
    assert (prediction.is_warm, prediction.expected.terms[Term.QUEUE]) == (True, 40.0)


def test_a_first_report_is_known_before_the_first_start() -> None:
    bench = RouterBench()
    bench.deploy("a", min_replicas=1)
    report = NodeReported("n", is_warm=False, residency={"a": Tier.HOST}, nbytes={"a": 123})
    (action,) = bench.tell(NodeJoined("n", 1, report=report))
    assert isinstance(action, StartReplica)
    prediction = bench.core.scaling.predictions[action.replica]
    assert (prediction.tier, prediction.is_warm) == ("HOST", False)
    assert bench.core.models["a"].spec.nbytes == 123
