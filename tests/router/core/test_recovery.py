"""A router that comes back: what runs goes on, what waits waits again, what is of no use ends after its requests."""

from __future__ import annotations

import random
from dataclasses import replace

from sllm_vllm.router.core.cluster import Replica, ReplicaState
from sllm_vllm.router.core.events import ModelDeployed, NodeJoined, RequestArrived, RequestFound, StopReplica
from sllm_vllm.router.core.facts import FoundReplica, ModelSpec, RequestFacts
from sllm_vllm.router.core.router import RouterCore
from tests.router.core.router_bench import RouterBench, deploy_randomly, settle, step
from tests.support.cases import every_case

NUM_STEPS = 120
RESTART_SHARE = 0.04


def found_of(bench: RouterBench, replica: Replica, facts: dict[str, RequestFacts]) -> FoundReplica:
    """As its agent and those who stream from it tell of it."""
    here = [name for name, where in bench.books.running.items() if where == replica.id]
    return FoundReplica(
        id=replica.id,
        model=replica.model,
        generation=replica.generation,
        lineage=replica.lineage,
        num_slots=replica.num_slots,
        is_ready=replica.id in bench.ready,
        is_stopping=replica.id in bench.stopping,
        requests=tuple(facts[name] for name in here),
    )


class Lives(RouterBench):
    """With a number for each life of the router."""

    lives = 0


def restart(bench: Lives) -> None:
    """The core is lost, and made anew of what agents and ingresses know."""
    old, books = bench.core, bench.books
    facts = {name: request.facts for name, request in old.requests.items()}
    again = [*books.waiting, *bench.lost]
    for name in again:
        books.running.pop(name, None)
    books.waiting.clear()
    bench.lost.clear()
    bench.moving.clear()
    bench.drained.clear()
    bench.lives += 1
    scaling = replace(old.limits.scaling, name_suffix=f"-{bench.lives}")
    bench.core = RouterCore(replace(old.limits, scaling=scaling))
    for state in old.models.values():
        bench.core.handle(ModelDeployed(state.spec), bench.now_s)
    for node in old.cluster.nodes.values():
        found = tuple(found_of(bench, one, facts) for one in node.replicas.values() if one.model)
        for action in bench.core.handle(NodeJoined(node.id, node.num_slots, found=found), bench.now_s):
            bench._take(action)
        bench.core.validate()
    bench._compare()
    for name in again:
        books.waiting[name] = None
        bench.tell(RequestArrived(facts[name]))


@every_case("seed", range(100))
def test_a_life_with_restarts_keeps_every_invariant_and_serves_or_tells_everybody(seed: int) -> None:
    chance = random.Random(seed)
    bench = Lives()
    models = [f"m{index}" for index in range(chance.randint(1, 5))]
    for index in range(chance.randint(1, 3)):
        bench.node(f"n{index}", chance.choice((1, 2, 4)))
    for model in models:
        deploy_randomly(bench, model, chance)
    for _ in range(NUM_STEPS):
        step(bench, models, chance)
        bench.now_s += chance.expovariate(2.0)
        if chance.random() < RESTART_SHARE:
            restart(bench)
    restart(bench)
    settle(bench)
    assert len(bench.books.ended) + len(bench.books.rejected) == bench.num_requests
    assert not bench.books.waiting
    assert not bench.books.running


def ready(name: str, model: str, *requests: RequestFacts, generation: int = 0) -> FoundReplica:
    return FoundReplica(name, model, generation, lineage=0, num_slots=1, is_ready=True, requests=requests)


def recovered(*found: FoundReplica) -> RouterCore:
    core = RouterCore()
    core.handle(ModelDeployed(ModelSpec("m", max_replicas=3)), 0.0)
    actions = core.handle(NodeJoined("n", 2, found=found), 0.0)
    assert [one.replica for one in actions if isinstance(one, StopReplica)] == []
    core.validate()
    return core


def test_a_found_replica_serves_the_next_request_at_once() -> None:
    core = recovered(ready("a", "m"))
    core.handle(RequestArrived(RequestFacts("r", "m")), 1.0)
    assert core.requests["r"].replica == "a"


def test_what_nobody_deployed_any_more_ends_after_its_requests() -> None:
    core = recovered(
        ready("a", "gone", RequestFacts("r", "gone")), ready("b", "m", RequestFacts("s", "m"), generation=7)
    )
    states = core.cluster.replicas
    assert [states[name].state for name in ("a", "b")] == [ReplicaState.DRAINING] * 2


def test_a_request_that_is_told_of_late_is_counted_whatever_its_replica_does() -> None:
    core = recovered(ready("a", "m"), ready("b", "gone", RequestFacts("r", "gone")))
    for request, replica in (("late", "a"), ("later", "b"), ("lost", "no such replica"), ("late", "b")):
        core.handle(RequestFound(RequestFacts(request, "m"), replica), 1.0)
        core.validate()
    assert {name: one.replica for name, one in core.requests.items()} == {"r": "b", "late": "a", "later": "b"}
    assert core.cluster.replicas["b"].state is ReplicaState.DRAINING


def test_a_replica_that_does_not_fit_its_node_is_not_taken_in() -> None:
    core = recovered(ready("a", "m"), ready("b", "m"), ready("c", "m"))
    assert set(core.cluster.replicas) == {"a", "b"}
