"""Starts that have others' requests move out of the way first, as they are decided and carried out."""

from __future__ import annotations

from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.core.events import DrainAsked
from sllm_vllm.router.core.facts import MoveLimits, RouterLimits, Tier
from tests.router.core.router_bench import RouterBench

LARGE, SMALL = 20_000_000_000, 200_000_000
LONG_S = 1000.0


def crowded(limits: MoveLimits | None = None, **old: object) -> tuple[RouterBench, str]:
    """``old`` answers a request on the only node that has ``new`` in memory; elsewhere that would be fetched first."""
    bench = RouterBench(RouterLimits(moves=limits or MoveLimits()))
    bench.node("here", 1, old=Tier.HOST, new=Tier.HOST)
    bench.deploy("old", **{"nbytes": SMALL, "max_replicas": 2, **old})
    bench.deploy("new", nbytes=LARGE)
    request = bench.ask("old", prompt_tokens=100)
    bench.start()
    bench.answer(request)
    bench.now_s += LONG_S
    bench.node("there", 1, old=Tier.DISK)
    return bench, request


def test_a_model_is_started_where_it_is_resident_and_its_room_is_made_by_a_move() -> None:
    bench, request = crowded()
    source = bench.books.running[request]
    waiting = bench.ask("new")
    ((target, order),) = bench.starting.items()
    assert (order.model, order.node) == ("old", "there")
    assert bench.core.cluster.replicas[source].state is ReplicaState.DRAINING
    bench.start(target)
    assert bench.moving[request].target == target
    bench.move(request)
    assert source in bench.stopping
    bench.stopped(source)
    ((_, start),) = bench.starting.items()
    assert (start.model, start.node) == ("new", "here")
    bench.start()
    assert waiting in bench.books.running
    assert bench.books.running[request] == target


def test_what_others_may_lose_for_it_is_shown() -> None:
    bench, request = crowded()
    plans = bench.core.scaling.plans_for(bench.core.models["new"], bench.now_s)
    assert [(plan.kind.value, plan.node) for plan in plans] == [("migrate", "here"), ("start", "there")]
    assert plans[0].moved == (request,)
    assert [(one.model, one.node) for one in plans[0].relocations] == [("old", "there")]


def test_a_replica_that_is_there_is_a_better_target_than_a_new_one() -> None:
    bench, request = crowded(min_replicas=0, target_ongoing=1)
    bench.ask("old")  # so a second one starts
    other = bench.start()
    bench.end(next(one for one in bench.books.running if one != request)) if len(bench.books.running) > 1 else None
    bench.now_s += LONG_S
    bench.node("third", 1)
    bench.ask("new")
    assert [(order.model, order.node) for order in bench.starting.values()] == []
    assert bench.moving[request].target == other


def test_requests_that_end_first_leave_the_start_what_it_needs() -> None:
    bench, request = crowded()
    bench.ask("new")
    source = bench.books.running[request]
    bench.end(request)
    bench.stopped(source)
    assert {order.model for order in bench.starting.values()} == {"old", "new"}
    bench.start(next(name for name, order in bench.starting.items() if order.model == "old"))
    bench.wait(10_000.0)
    assert "there" in bench.stopping.values(), "nobody wants it any more"


def test_a_relocation_that_fails_leaves_the_request_where_it_is() -> None:
    bench, request = crowded()
    waiting = bench.ask("new")
    source = bench.books.running[request]
    bench.fail_start(reason="no memory")
    assert bench.books.running[request] == source
    bench.wait(5.0)
    bench.start()  # it is tried again, as the request is still there
    bench.move(request)
    bench.stopped(source)
    bench.start()
    assert waiting in bench.books.running


def test_nobody_has_to_go_who_has_only_just_come() -> None:
    """Else two models would push each other around."""
    bench, request = crowded()
    bench.core.cluster.replicas[bench.books.running[request]].ready_s = bench.now_s
    bench.ask("new")
    assert [(order.model, order.node) for order in bench.starting.values()] == [("new", "there")]


def test_nobody_has_to_go_whose_requests_cant() -> None:
    bench, request = crowded()
    bench.core.requests[request].stays = True
    bench.ask("new")
    assert [(order.model, order.node) for order in bench.starting.values()] == [("new", "there")]


def test_nobody_has_to_go_where_moves_are_switched_off() -> None:
    bench, _ = crowded(MoveLimits(is_on=False))
    bench.ask("new")
    assert [(order.model, order.node) for order in bench.starting.values()] == [("new", "there")]


def test_a_target_of_moves_is_no_victim() -> None:
    bench, request = crowded(target_ongoing=1)
    bench.ask("old")
    other = bench.start()
    source = bench.books.running[request]
    bench.tell(DrainAsked(source))
    assert bench.moving[request].target == other
    bench.now_s += LONG_S
    bench.ask("new")
    assert bench.core.cluster.replicas[other].state is ReplicaState.READY
