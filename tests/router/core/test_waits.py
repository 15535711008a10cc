"""Starts that hang: their timeout, whose slots they hold, and what those who wait are told."""

from __future__ import annotations

import pytest

from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.events import Refusal, RejectRequest
from sllm_vllm.router.core.facts import StartSample, Tier
from tests.router.core.router_bench import RouterBench
from tests.support.cases import every_case


def bench_of(num_slots: int = 1, **fields: object) -> RouterBench:
    """A node, and two models on its disk."""
    bench = RouterBench()
    bench.node("n", num_slots, a=Tier.DISK, b=Tier.DISK)
    for name in "ab":
        bench.deploy(name, **{"nbytes": 1 << 30, **fields})
    return bench


def refusal(bench: RouterBench, request: str) -> RejectRequest:
    rejected = bench.books.rejected[request]
    assert rejected.why is Refusal.TOO_LATE
    return rejected


# ------------------------------------------------------------------------------------------------ whose slots they hold


def test_a_start_that_nothing_waits_for_gives_its_slot_to_another_model() -> None:
    bench = bench_of()
    vain = bench.ask("a")
    (hung,) = bench.starting
    bench.leave(vain)
    bench.ask("b")
    assert bench.stopping == {hung: "n"}
    bench.stopped(hung)
    assert [order.model for order in bench.starting.values()] == ["b"]


def test_a_start_whose_requests_gave_up_waiting_gives_its_slot_to_another_model() -> None:
    bench = bench_of(queue_s_max=10.0)
    vain = bench.ask("a")
    (hung,) = bench.starting
    bench.wait(5.0)
    other = bench.ask("b")
    bench.wait(5.5)
    assert vain in bench.books.rejected
    assert other in bench.books.waiting
    bench.wait(0.25)
    assert bench.stopping == {hung: "n"}


def test_a_start_that_nothing_waits_for_goes_on_while_its_slot_is_not_needed() -> None:
    bench = bench_of(num_slots=2)
    bench.leave(bench.ask("a"))
    bench.ask("b")
    bench.wait(30.0)
    assert sorted(order.model for order in bench.starting.values()) == ["a", "b"]
    assert not bench.stopping


def test_a_start_that_is_waited_for_or_must_be_kept_is_no_victim() -> None:
    bench = bench_of()
    bench.ask("a")
    bench.ask("b")
    bench.wait(1.0)
    assert not bench.stopping
    kept = bench_of(min_replicas=1)
    kept.ask("b")
    kept.wait(1.0)
    assert not kept.stopping


def test_a_request_that_comes_again_saves_a_start() -> None:
    bench = bench_of()
    bench.leave(bench.ask("a"))
    bench.ask("a")
    bench.ask("b")
    bench.wait(1.0)
    assert not bench.stopping


# ----------------------------------------------------------------------------------------------------------- timeouts


def test_a_start_may_take_what_its_model_says() -> None:
    bench = bench_of(start_s_max=77.0)
    bench.ask("a")
    assert [order.timeout_s for order in bench.starting.values()] == [77.0]


@every_case("nbytes, timeout_s", [(1, 120.0), (4 << 40, 600.0)])
def test_else_between_two_and_ten_minutes(nbytes: int, timeout_s: float) -> None:
    bench = bench_of(nbytes=nbytes)
    bench.core.estimator.observe_start(StartSample("a", "n", True, Tier.DISK, nbytes, 0.2, 0.2, nbytes / 2e9))
    bench.ask("a")
    assert [order.timeout_s for order in bench.starting.values()] == [timeout_s]


def test_a_first_start_gets_the_longest_time_whatever_is_guessed_of_it() -> None:
    """Its weights may be on a cold disk, its code is not compiled, and other models tell nothing of it."""
    bench = bench_of(nbytes=1)
    bench.core.estimator.observe_start(StartSample("b", "n", True, Tier.DISK, 1, 0.2, 0.2, 0.1))
    bench.ask("a")
    assert [order.timeout_s for order in bench.starting.values()] == [600.0]


def test_starts_that_are_cut_get_longer() -> None:
    """Else a node that has become slower than all samples would cut each of them, without end."""
    bench = bench_of()
    for _ in range(3):
        bench.core.estimator.observe_start(StartSample("a", "n", True, Tier.DISK, 1, 0.2, 0.2, 0.1))
    bench.ask("a")
    bench.ask("a")
    found = []
    for _ in range(4):
        found.append(next(iter(bench.starting.values())).timeout_s)
        bench.fail_start(reason="not healthy in time")
        bench.wait(70.0)
        if not bench.starting:
            bench.ask("a")
    assert found == [120.0, 240.0, 480.0, 600.0]


def test_the_99th_percentile_is_nearer_to_what_is_expected_the_steadier_starts_are() -> None:
    estimator = Estimator()
    estimator.observe_start(StartSample("m", "n", True, Tier.DISK, 1, 0.0, 10.0, 0.0))
    assert estimator.startup_p99_s("m", 20.0) == pytest.approx(204.7, abs=0.1)
    for seconds in (10.0, 10.0, 10.0):
        estimator.observe_start(StartSample("m", "n", True, Tier.DISK, 1, 0.0, seconds, 0.0))
    assert estimator.startup_p99_s("m", 20.0) == pytest.approx(64.0, abs=0.1)
    estimator.observe_start(StartSample("m", "n", True, Tier.DISK, 1, 0.0, 1000.0, 0.0))
    assert estimator.startup_p99_s("m", 20.0) == pytest.approx(204.7, abs=0.1)


# ------------------------------------------------------------------------------------------------ what they are told


def test_a_request_waits_on_for_an_engine_that_is_due() -> None:
    bench = bench_of(queue_s_max=10.0, waits_for_start=True)
    request = bench.ask("a")
    (replica,) = bench.core.cluster.replicas.values()
    due_s = replica.ready_at_s
    assert due_s > 10.0
    bench.wait(due_s - 0.5)
    assert request in bench.books.waiting
    bench.start()
    assert request in bench.books.running


def test_it_does_not_wait_for_one_that_is_late_or_longer_than_it_was_told_to() -> None:
    late = bench_of(queue_s_max=10.0, waits_for_start=True)
    request = late.ask("a")
    for _ in range(20):
        late.wait(1.0)
    told = refusal(late, request)
    assert told.reason.startswith("its engine on node n has been starting for 1")
    assert told.reason.endswith("longer than predicted")
    strict = bench_of(queue_s_max=10.0)
    request = strict.ask("a")
    strict.wait(10.0)
    told = refusal(strict, request)
    assert told.reason == "its engine on node n has been starting for 10 s and is expected in 3 s"
    assert told.retry_after_s == pytest.approx(2.85, abs=0.5)


def test_a_client_is_told_which_models_have_the_slots() -> None:
    bench = bench_of(queue_s_max=10.0)
    bench.ask("b")
    replica = bench.start()
    request = bench.ask("a")
    bench.now_s += 10.0
    bench.wait(0.0)
    told = refusal(bench, request)
    assert told.reason == "all slots are taken: b on n (1 requests)"
    assert told.retry_after_s is not None
    assert 1.0 < told.retry_after_s < 60.0
    assert replica in bench.ready


def test_a_client_is_told_of_replicas_that_are_busy_and_of_slots_that_are_being_freed() -> None:
    bench = bench_of(queue_s_max=10.0, ongoing_max=1, target_ongoing=1)
    bench.ask("a")
    bench.start()
    request = bench.ask("a")
    bench.wait(10.0)
    assert refusal(bench, request).reason == "all its replicas are busy: 1 requests on 1"
    freed = bench_of(queue_s_max=10.0)
    idle = freed.ask("b")
    freed.start()
    freed.end(idle)
    request = freed.ask("a")
    freed.wait(10.0)
    assert refusal(freed, request).reason == "its engine starts when these have ended: b on n (stopping)"
