"""Where each compared policy starts a model, and that each serves every request once, whatever fails."""

from __future__ import annotations

from dataclasses import replace

from sllm_vllm.router.core.events import (
    Dispatch,
    FirstByte,
    ModelDeployed,
    MoveRequest,
    NodeJoined,
    NodeReported,
    RejectRequest,
    ReplicaEnded,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestGone,
    RequestMoved,
    StartReplica,
    StopReplica,
    Ticked,
)
from sllm_vllm.router.core.facts import ModelSpec, RequestFacts, Tier
from sllm_vllm.simulate.baseline import Baseline
from sllm_vllm.simulate.baselines import (
    Availability,
    RoundRobin,
    Serverless,
    ServerlessLLM,
    Shepherd,
    baselines,
)
from sllm_vllm.simulate.hardware import FaultRates, HardwareCluster
from sllm_vllm.simulate.policy import Order, PreemptRequest
from sllm_vllm.simulate.presets import HERE, PAPER
from sllm_vllm.simulate.workload import draw_requests
from sllm_vllm.simulate.world import World
from tests.simulate.scripted import KIND
from tests.support.cases import every_case

NAMES = sorted(baselines({}, 0))
HOPS = {Tier.HOST: 10_000.0, Tier.DISK: 2_000.0, Tier.REMOTE: 100.0}
ROUGH = FaultRates(
    start_share=0.1, crashes_per_hour=20.0, losses_per_hour=10.0, leave_share=0.1, outlier_share=0.05, node_back_s=20.0
)
CLASSES = {f"m-{number}": KIND for number in range(4)}


def join(policy: Baseline, num_nodes: int, num_slots: int = 1, *, disks: dict[int, list[str]] | None = None) -> None:
    """Nodes n0, n1, …, and models m-0 to m-3; ``disks``: models by the number of the node whose disk has them."""
    for number in range(num_nodes):
        policy.handle(NodeJoined(f"n{number}", num_slots), 0.0)
        residency = dict.fromkeys((disks or {}).get(number, []), Tier.DISK)
        policy.handle(NodeReported(f"n{number}", True, residency, {}, HOPS), 0.0)
    for model in CLASSES:
        spec = ModelSpec(model, max_replicas=2, target_ongoing=2, ongoing_max=2, nbytes=10_000, queue_s_max=60.0)
        policy.handle(ModelDeployed(spec), 0.0)


def arrive(policy: Baseline, request: str, model: str, now_s: float = 0.0) -> list[Order]:
    return policy.handle(RequestArrived(RequestFacts(request, model, prompt_tokens=50)), now_s)


def started(orders: list[Order]) -> StartReplica:
    (order,) = [order for order in orders if isinstance(order, StartReplica)]
    return order


def run_on(policy: Baseline, request: str, model: str, now_s: float = 0.0) -> StartReplica:
    """Have a model started for a request, which then runs on it and has its first token."""
    order = started(arrive(policy, request, model, now_s))
    assert policy.handle(ReplicaReady(order.replica), now_s) == [Dispatch(request, order.replica, 1)]
    policy.handle(FirstByte(request), now_s)
    return order


def test_availability_takes_the_first_node_wherever_the_model_lies() -> None:
    policy = Availability()
    join(policy, 3, disks={2: ["m-0"]})
    assert [started(arrive(policy, f"r{n}", f"m-{n}")).node for n in range(3)] == ["n0", "n1", "n2"]


def test_round_robin_goes_on_behind_the_last_node() -> None:
    policy = RoundRobin()
    join(policy, 3, num_slots=2)
    assert [started(arrive(policy, f"r{n}", f"m-{n}")).node for n in range(4)] == ["n0", "n1", "n2", "n0"]


def test_serverless_draws_among_nodes_with_free_slots() -> None:
    nodes = set()
    for seed in range(20):
        policy = Serverless(seed)
        join(policy, 3)
        taken = started(arrive(policy, "r0", "m-0")).node
        drawn = started(arrive(policy, "r1", "m-1")).node
        assert drawn != taken
        nodes.add(drawn)
    assert nodes == {"n0", "n1", "n2"}


@every_case("make", [Shepherd, lambda: ServerlessLLM(CLASSES)])
def test_locality_goes_where_the_model_lies(make: type[Baseline]) -> None:
    policy = make()
    join(policy, 3, disks={2: ["m-0"]})
    assert started(arrive(policy, "r0", "m-0")).node == "n2"


@every_case("make", [Shepherd, lambda: ServerlessLLM(CLASSES)])
def test_long_load_queue_weighs_more_than_the_disk(make: type[Baseline]) -> None:
    """Each load from n1's disk takes 5 s; from n0's memory 1 s."""
    policy = make()
    join(policy, 2, num_slots=2, disks={1: ["m-0", "m-1"]})
    policy.handle(NodeReported("n0", True, {"m-1": Tier.HOST}, {}, HOPS), 0.0)
    assert started(arrive(policy, "r0", "m-0")).node == "n1"
    assert started(arrive(policy, "r1", "m-1")).node == "n0"


def test_shepherd_preempts_who_runs_where_the_model_lies() -> None:
    policy = Shepherd()
    join(policy, 2, disks={0: ["m-0", "m-1"], 1: ["m-2"]})
    first = run_on(policy, "r0", "m-0")
    other = run_on(policy, "r1", "m-2")
    assert (first.node, other.node) == ("n0", "n1")
    orders = arrive(policy, "r2", "m-1", 10.0)
    assert orders[:2] == [PreemptRequest("r0", first.replica), StopReplica(first.replica, "n0", orders[1].reason)]  # type: ignore[union-attr]
    ended = policy.handle(ReplicaEnded(first.replica), 11.0)
    assert started(ended).model == "m-1"


def test_shepherd_preempts_nobody_twice() -> None:
    policy = Shepherd()
    join(policy, 1, disks={0: ["m-0", "m-1", "m-2"]})
    first = run_on(policy, "r0", "m-0")
    arrive(policy, "r1", "m-1")
    second = started(policy.handle(ReplicaEnded(first.replica), 1.0))
    policy.handle(ReplicaReady(second.replica), 2.0)
    policy.handle(RequestEnded("r1"), 3.0)
    again = started(policy.handle(ReplicaEnded(second.replica), 4.0))
    assert again.model == "m-0"
    assert policy.handle(ReplicaReady(again.replica), 5.0) == [Dispatch("r0", again.replica, 1)]
    assert arrive(policy, "r2", "m-2", 6.0) == []


def test_serverlessllm_moves_who_runs_where_the_model_lies() -> None:
    """n0 alone has the models: 5 s from its disk, 100 s from afar. So r0 goes on at n1, and m-1 takes n0."""
    policy = ServerlessLLM(CLASSES)
    join(policy, 2, disks={0: ["m-0", "m-1"], 1: ["m-0"]})
    source = run_on(policy, "r0", "m-0")
    assert source.node == "n0"
    target = started(arrive(policy, "r1", "m-1", 10.0))
    assert (target.model, target.node) == ("m-0", "n1")
    assert policy.handle(ReplicaReady(target.replica), 18.0) == [MoveRequest("r0", source.replica, target.replica)]
    (stop,) = policy.handle(RequestMoved("r0", target.replica), 19.0)
    assert isinstance(stop, StopReplica)
    assert stop.replica == source.replica
    order = started(policy.handle(ReplicaEnded(source.replica), 19.5))
    assert (order.model, order.node) == ("m-1", "n0")


def test_serverlessllm_moves_nobody_where_a_load_elsewhere_is_sooner() -> None:
    policy = ServerlessLLM(CLASSES)
    join(policy, 2, disks={0: ["m-0", "m-1"], 1: ["m-1"]})
    run_on(policy, "r0", "m-0")
    assert started(arrive(policy, "r1", "m-1", 10.0)).node == "n1"


def test_call_off_lets_the_source_serve_on() -> None:
    policy = ServerlessLLM(CLASSES)
    join(policy, 2, disks={0: ["m-0", "m-1"], 1: ["m-0"]})
    source = run_on(policy, "r0", "m-0")
    target = started(arrive(policy, "r1", "m-1", 10.0))
    policy.handle(RequestGone("r1"), 11.0)
    policy.handle(ReplicaEnded(target.replica, "it did not start", is_fault=True), 12.0)
    assert arrive(policy, "r2", "m-0", 13.0) == [Dispatch("r2", source.replica, 1)]


def test_longest_idle_replica_is_evicted() -> None:
    policy = Availability()
    join(policy, 1, num_slots=2)
    replicas = [run_on(policy, f"r{n}", f"m-{n}").replica for n in range(2)]
    policy.handle(RequestEnded("r1"), 1.0)
    policy.handle(RequestEnded("r0"), 2.0)
    (stop,) = arrive(policy, "r2", "m-2", 3.0)
    assert isinstance(stop, StopReplica)
    assert stop.replica == replicas[1]


def test_idle_replica_stays_as_long_as_its_start_took() -> None:
    policy = Availability()
    join(policy, 1)
    order = started(arrive(policy, "r0", "m-0"))
    policy.handle(ReplicaReady(order.replica), 8.0)
    policy.handle(RequestEnded("r0"), 10.0)
    assert policy.handle(Ticked(), 17.9) == []
    assert [type(order) for order in policy.handle(Ticked(), 18.0)] == [StopReplica]


def test_request_that_waits_too_long_is_rejected() -> None:
    policy = Availability()
    join(policy, 1)
    run_on(policy, "r0", "m-0")
    arrive(policy, "r1", "m-1")
    assert not any(isinstance(order, RejectRequest) for order in policy.handle(Ticked(), 59.0))
    assert any(isinstance(order, RejectRequest) for order in policy.handle(Ticked(), 60.0))


def test_failed_request_is_sent_again_and_then_rejected() -> None:
    policy = Availability()
    join(policy, 1)
    order = run_on(policy, "r0", "m-0")
    assert policy.handle(RequestFailed("r0", "test"), 1.0) == [Dispatch("r0", order.replica, 2)]
    (rejected,) = policy.handle(RequestFailed("r0", "test"), 2.0)
    assert isinstance(rejected, RejectRequest)


def crowded(cluster: HardwareCluster) -> HardwareCluster:
    return replace(cluster, traffic=replace(cluster.traffic, rate=cluster.traffic.rate * 3), failures=ROUGH)


@every_case("name", NAMES)
@every_case("cluster", [PAPER, HERE])
def test_every_request_ends_once_whatever_fails(name: str, cluster: HardwareCluster) -> None:
    rough = crowded(cluster)
    for seed in range(3):
        requests = draw_requests(rough.traffic, list(rough.classes()), 150, seed=seed)
        policy = baselines(rough.classes(), seed)[name]()
        run = World(rough, policy, seed=seed, is_validated=True).run(requests)
        run.validate(len(requests))
        assert policy.requests == {}, f"seed {seed}"


@every_case("name", NAMES)
def test_same_seed_has_the_same_result(name: str) -> None:
    rough = crowded(PAPER)
    requests = draw_requests(rough.traffic, list(rough.classes()), 150, seed=5)
    runs = [World(rough, baselines(rough.classes(), 5)[name](), seed=5).run(requests) for _ in range(2)]
    assert runs[0] == runs[1]
