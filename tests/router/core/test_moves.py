"""Which requests move, where and when: off replicas that drain, bounded, each in two places until it has moved."""

from __future__ import annotations

import pytest

from sllm_vllm.router.core.events import (
    DrainAsked,
    MoveAsked,
    MoveFailed,
    MoveRequest,
    ReplicaMovable,
    RequestMoved,
)
from sllm_vllm.router.core.facts import MoveLimits, ResumeSample, RouterLimits
from tests.router.core.router_bench import RouterBench
from tests.support.cases import every_case


def bench_with(num_replicas: int = 2, *, limits: MoveLimits | None = None, **fields: object) -> RouterBench:
    """Replicas of one model on a node each, ready, with no request."""
    bench = RouterBench(RouterLimits(moves=limits or MoveLimits()))
    for number in range(num_replicas):
        bench.node(f"n{number}", 1)
    bench.deploy("a", **{"min_replicas": num_replicas, "max_replicas": 9, **fields})
    while bench.starting:
        bench.start()
    return bench


def drain(bench: RouterBench, replica: str) -> list[MoveRequest]:
    return [one for one in bench.tell(DrainAsked(replica)) if isinstance(one, MoveRequest)]


def test_a_request_on_a_replica_that_drains_moves_to_one_that_is_ready() -> None:
    bench = bench_with()
    request = bench.ask("a")
    source, target = (
        bench.books.running[request],
        next(one for one in bench.ready if one != bench.books.running[request]),
    )
    assert drain(bench, source) == [MoveRequest(request, source, target)]
    assert bench.core.cluster.replicas[target].ongoing == {request}
    assert bench.core.cluster.replicas[source].ongoing == {request}
    assert source not in bench.stopping
    bench.move(request)
    assert source in bench.stopping
    assert bench.core.requests[request].replica == target
    bench.end(request)
    assert bench.core.cluster.replicas[target].idle_since_s == bench.now_s


def test_a_target_is_nobodys_victim_while_a_request_moves_there() -> None:
    bench = bench_with(min_replicas=0)
    bench.deploy("b")
    for _ in range(2):  # none is kept, so they came by requests
        bench.ask("a")
    bench.start()
    request = next(iter(bench.books.running))
    source = bench.books.running[request]
    for other in list(bench.books.running):
        if other != request:
            bench.end(other)
    bench.node("n9", 1)
    bench.deploy("a", min_replicas=2, max_replicas=3)
    bench.start()
    drain(bench, source)
    (order,) = bench.moving.values()
    waiting = bench.ask("b")
    assert waiting in bench.books.waiting
    assert order.target not in bench.stopping


def test_where_a_request_moves_there_is_room_for_it() -> None:
    bench = bench_with(ongoing_max=1, target_ongoing=1)
    first, second = bench.ask("a"), bench.ask("a")
    assert drain(bench, bench.books.running[first]) == []
    bench.end(second)
    assert list(bench.moving) == [first]


def test_requests_move_a_few_at_once_the_others_when_these_have() -> None:
    many = {"target_ongoing": 9, "ongoing_max": 9}
    bench = bench_with(1, limits=MoveLimits(moves_max=3, per_target_max=2), **many)
    requests = [bench.ask("a") for _ in range(5)]
    source = bench.books.running[requests[0]]
    bench.node("n9", 1)
    bench.deploy("a", min_replicas=2, max_replicas=9, **many)
    target = bench.start()
    drain(bench, source)
    for num_at_once in (2, 2, 2, 2, 1):
        assert len(bench.moving) == num_at_once
        bench.move(next(iter(bench.moving)))
    assert set(bench.books.running.values()) == {target}
    assert source in bench.stopping


@every_case("is_lasting", [False, True])
def test_a_move_that_fails_is_tried_again_later_unless_it_is_in_vain(is_lasting: bool) -> None:
    bench = bench_with()
    request = bench.ask("a")
    source = bench.books.running[request]
    drain(bench, source)
    bench.fail_move(request, is_lasting=is_lasting)
    assert bench.moving == {}
    bench.wait(0.5)
    assert bench.moving == {}
    bench.wait(0.6)
    assert list(bench.moving) == ([] if is_lasting else [request])
    assert bench.books.running[request] == source


def test_a_request_whose_moves_fail_stays_and_ends_where_it_is() -> None:
    bench = bench_with()
    request = bench.ask("a")
    source = bench.books.running[request]
    drain(bench, source)
    for _ in range(2):
        bench.fail_move(request)
        bench.wait(2.0)
    assert bench.moving == {}
    bench.end(request)
    assert source in bench.stopping


def test_a_changed_models_requests_move_to_its_new_engines() -> None:
    bench = bench_with(1, lineage=5)
    request = bench.ask("a")
    old = bench.books.running[request]
    bench.node("n2", 1)
    bench.deploy("a", min_replicas=1, max_replicas=9, generation=1, lineage=5)
    new = bench.start()
    assert bench.moving == {request: MoveRequest(request, old, new)}
    bench.move(request)
    assert old in bench.stopping


def test_engines_that_answer_otherwise_take_over_nothing() -> None:
    bench = bench_with(1, lineage=5)
    request = bench.ask("a")
    bench.node("n2", 1)
    bench.deploy("a", min_replicas=1, max_replicas=9, generation=1, lineage=6)
    new = bench.start()
    assert bench.moving == {}
    assert bench.core.why_not_move(request, new, 0.0) == f"{new} would answer otherwise"


def test_a_drained_nodes_requests_move_to_a_replica_that_starts_for_them() -> None:
    bench = bench_with(1)
    request = bench.ask("a")
    source = bench.books.running[request]
    bench.node("n2", 1)
    bench.drain("n0")
    target = bench.start()
    assert bench.moving == {request: MoveRequest(request, source, target)}
    bench.move(request)
    assert source in bench.stopping


def test_a_drain_that_is_called_off_lets_a_move_finish() -> None:
    bench = bench_with(limits=MoveLimits(is_on=True))
    request = bench.ask("a")
    source = bench.books.running[request]
    drain(bench, source)
    bench.end(request)
    bench.tell(RequestMoved(request, "nobody"))
    bench.tell(MoveFailed(request, "nobody", "late"))
    assert bench.core.moves.moving == {}


def test_a_request_that_ends_first_frees_its_place_at_the_target() -> None:
    bench = bench_with()
    request = bench.ask("a")
    drain(bench, bench.books.running[request])
    target = bench.moving[request].target
    bench.end(request)
    assert not bench.core.cluster.replicas[target].ongoing


def test_a_target_that_dies_leaves_the_request_where_it_is() -> None:
    bench = bench_with()
    request = bench.ask("a")
    source = bench.books.running[request]
    drain(bench, source)
    order = bench.moving[request]
    bench.crash(order.target)
    assert bench.core.requests[request].target is None
    bench.tell(MoveFailed(request, order.target, "connection reset"))
    assert bench.books.running[request] == source


def test_an_operator_moves_a_request_where_it_should_go() -> None:
    bench = bench_with(3)
    request = bench.ask("a")
    source = bench.books.running[request]
    target = max(one for one in bench.ready if one != source)
    assert bench.tell(MoveAsked(request, target)) == [MoveRequest(request, source, target)]
    bench.move(request)
    assert bench.tell(MoveAsked(request))
    assert bench.moving[request].source == target


def test_an_operator_is_told_what_keeps_a_request_where_it_is() -> None:
    bench = bench_with(ongoing_max=1, target_ongoing=1, limits=MoveLimits(moves_max=1))
    first = bench.ask("a")
    here = bench.books.running[first]
    there = next(one for one in bench.ready if one != here)

    def told(request: str, target: str | None) -> str:
        assert bench.tell(MoveAsked("r0", target)) == []
        return bench.core.why_not_move(request, target, bench.now_s)

    assert told("r0", None) == "no replica has it"
    assert told(first, here) == f"it is on {here} already"
    assert told(first, "nobody") == "there is no replica nobody"
    bench.tell(ReplicaMovable(there, is_movable=False))
    assert told(first, there) == f"{there} takes over no requests"
    assert told(first, None) == "no other replica of its model can take it now"
    bench.tell(ReplicaMovable(there, is_movable=True))
    second = bench.ask("a")
    assert told(first, there) == f"{there} has no room"
    bench.end(second)
    bench.tell(MoveAsked(first, there))
    assert told(first, None) == f"it is moving to {there} already"
    bench.deploy("a", min_replicas=2, max_replicas=9, ongoing_max=9)
    third = bench.ask("a")
    assert told(third, None) == "1 requests move already"
    bench.fail_move(first)
    assert told(first, None) == "its last move has only just failed"
    bench.tell(ReplicaMovable(here, is_movable=False))
    assert told(first, None) == "its engine hands over no requests"
    bench.tell(ReplicaMovable("nobody", is_movable=True))


def test_nothing_moves_where_it_is_switched_off() -> None:
    bench = bench_with(limits=MoveLimits(is_on=False))
    request = bench.ask("a")
    assert drain(bench, bench.books.running[request]) == []
    assert bench.core.why_not_move(request, None, 0.0) == "moving requests is switched off"


def test_what_a_round_took_tells_what_the_next_will() -> None:
    bench = bench_with()
    for num, seconds in ((100, 0.2), (1000, 1.1), (4000, 4.1)):
        samples = (ResumeSample("a", "n1", num, seconds),)
        bench.tell(RequestMoved("r0", "nobody", samples))
    assert bench.core.estimator.resume_s("a", "n1", 2000) == pytest.approx(2.1)
    assert bench.core.estimator.resume_s("a", "n9", 2000) == pytest.approx(2.1)


def test_output_tokens_so_far_are_guessed_by_the_time_that_one_takes() -> None:
    bench = bench_with()
    first = bench.ask("a")
    bench.answer(first)
    bench.now_s += 3.0
    bench.end(first)  # seven tokens, so half a second each
    state = bench.core.models["a"]
    assert state.token_s == pytest.approx(0.5)
    second = bench.ask("a")
    request = bench.core.requests[second]
    assert request.num_output_tokens(state.token_s, bench.now_s) == 0
    bench.answer(second)
    assert request.num_output_tokens(state.token_s, bench.now_s + 5.0) == 10
