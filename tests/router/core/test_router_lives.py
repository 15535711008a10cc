"""What only a long life, a fault or an operator brings about: back-off, deadlines, deletions, changed limits."""

from __future__ import annotations

from sllm_vllm.router.core.alarms import Alarms
from sllm_vllm.router.core.events import PrefetchModel, Refusal, Ticked
from sllm_vllm.router.core.facts import FailureSign, RouterLimits, Tier
from sllm_vllm.router.core.model_state import BACK_OFF_S_MAX, FAILURES_MAX, STEADY_S, BackOff
from tests.router.core.router_bench import RouterBench
from tests.support.cases import every_case


def bench_with(*, num_slots: int = 1, **fields: object) -> RouterBench:
    bench = RouterBench()
    bench.node("n", num_slots)
    bench.deploy("a", **fields)
    return bench


# ------------------------------------------------------------------------------------------------------------ back-off


def test_a_model_that_is_kept_is_tried_for_ever_and_never_more_often_than_once_a_minute() -> None:
    bench = bench_with(min_replicas=1)
    bench.fail_start()
    for _ in range(1200):
        while not bench.starting:
            bench.wait(BACK_OFF_S_MAX)
        bench.fail_start()
    back_off = bench.core.models["a"].back_off
    assert back_off.num_failures == 1201
    assert back_off.until_s - bench.now_s == BACK_OFF_S_MAX


@every_case("num_failures", [1, 7, 16, 17, 5000])
def test_pauses_double_up_to_a_minute(num_failures: int) -> None:
    back_off = BackOff()
    now_s = 0.0
    for _ in range(num_failures):
        now_s = back_off.until_s
        back_off.failed("no", now_s)
    assert back_off.until_s - now_s == min(BACK_OFF_S_MAX, 2.0 ** (min(num_failures, 17) - 1))


def test_starts_that_fail_together_are_one_failure() -> None:
    bench = bench_with(num_slots=4, max_replicas=4, target_ongoing=1, ongoing_max=1)
    for _ in range(4):
        bench.ask("a")
    assert len(bench.starting) == 4
    while bench.starting:
        bench.fail_start()
    assert bench.core.models["a"].back_off.num_failures == 1
    assert len(bench.books.waiting) == 4
    bench.wait(1.0)
    assert bench.starting


def test_after_three_in_a_row_who_waits_is_told_and_the_next_attempt_serves() -> None:
    bench = bench_with()
    request = bench.ask("a")
    for _ in range(FAILURES_MAX):
        bench.fail_start(reason="no such file")
        bench.wait(4.0)
    rejected = bench.books.rejected[request]
    assert (rejected.why, rejected.reason) == (Refusal.NO_START, "no such file")
    assert rejected.retry_after_s is not None
    bench.wait(60.0)
    again = bench.ask("a")
    bench.start()
    assert again in bench.books.running


@every_case("alive_s", [0.0, 3.0, STEADY_S - 1])
def test_an_engine_that_dies_soon_after_it_was_ready_is_started_less_and_less_often(alive_s: float) -> None:
    bench = bench_with(min_replicas=1)
    pauses_s = []
    for _ in range(8):
        replica = bench.start()
        bench.wait(alive_s)
        bench.crash(replica)
        died_s = bench.now_s
        while not bench.starting:
            bench.wait(0.25)
        pauses_s.append(bench.now_s - died_s)
    assert pauses_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, BACK_OFF_S_MAX, BACK_OFF_S_MAX]


def test_who_waits_for_an_engine_that_dies_again_and_again_is_told() -> None:
    bench = bench_with(min_replicas=1)
    for _ in range(FAILURES_MAX):
        replica = bench.start()
        bench.wait(3.0)
        bench.crash(replica)
        bench.wait(4.0)
    bench.fail_start(reason="it ends by signal 11")
    request = bench.ask("a")
    rejected = bench.books.rejected[request]
    assert (rejected.why, rejected.reason) == (Refusal.NO_START, "it ends by signal 11")


def test_failures_are_forgotten_when_a_replica_has_lived_for_a_while_and_not_before() -> None:
    bench = bench_with(min_replicas=1)
    back_off = bench.core.models["a"].back_off
    bench.fail_start()
    bench.wait(1.0)
    replica = bench.start()
    bench.wait(STEADY_S - 1)
    assert back_off.num_failures == 1
    bench.wait(1.0)
    assert (back_off.num_failures, back_off.reason) == (0, "")
    bench.crash(replica)
    assert bench.starting  # at once: it was no failed start


def test_a_request_that_waits_too_long_beside_a_busy_replica_is_not_told_of_an_old_failure() -> None:
    bench = bench_with(queue_s_max=5.0, ongoing_max=1, max_replicas=1)
    bench.ask("a")
    bench.fail_start(reason="no such file")
    bench.wait(1.0)
    bench.start()
    request = bench.ask("a")
    bench.wait(6.0)
    assert bench.books.rejected[request].why is Refusal.TOO_LATE


def test_deploying_again_tries_at_once() -> None:
    bench = bench_with(min_replicas=1)
    bench.fail_start()
    assert not bench.starting
    bench.deploy("a", min_replicas=1)
    assert bench.starting


# ----------------------------------------------------------------------------------------------------------- deadlines


def test_time_that_a_request_was_with_a_replica_that_failed_it_is_no_time_of_waiting() -> None:
    bench = bench_with(queue_s_max=20.0)
    request = bench.ask("a")
    replica = bench.start(seconds=10.0)
    bench.wait(100.0)
    bench.crash(replica)
    bench.notice(request, FailureSign.REFUSED)
    bench.wait(5.0)
    assert request in bench.books.waiting
    bench.start()
    assert request in bench.books.running


def test_a_request_waits_no_longer_than_it_may_in_all_its_waits() -> None:
    bench = bench_with(queue_s_max=20.0)
    request = bench.ask("a")
    replica = bench.start(seconds=10.0)
    bench.wait(100.0)
    bench.crash(replica)
    bench.notice(request, FailureSign.REFUSED)
    bench.wait(10.0)
    assert bench.books.rejected[request].why is Refusal.TOO_LATE


def test_a_request_is_not_sent_again_to_a_replica_that_could_not_be_reached_while_its_end_is_about_to_be_told() -> None:
    """Its agent may take seconds to see that all of an engine's processes have ended."""
    bench = bench_with(num_slots=1)
    request = bench.ask("a")
    dead = bench.start()
    bench.notice(request, FailureSign.UNREACHED)
    bench.wait(5.0)
    assert request in bench.books.waiting
    bench.crash(dead)
    while not bench.starting:  # it died young
        bench.wait(1.0)
    bench.start()
    assert request in bench.books.running


def test_a_replica_that_could_not_be_reached_for_a_moment_gets_requests_again() -> None:
    bench = bench_with(num_slots=1)
    request = bench.ask("a")
    bench.start()
    bench.notice(request, FailureSign.UNREACHED)
    bench.wait(11.0)
    assert request in bench.books.running


def test_replicas_that_could_not_be_reached_use_up_no_attempts() -> None:
    """A lost node takes several replicas with it, and no engine got the request."""
    bench = bench_with(num_slots=4, max_replicas=4, target_ongoing=1, ongoing_max=1)
    fillers = [bench.ask("a") for _ in range(4)]
    replicas = {bench.start() for _ in range(4)}
    for filler in fillers:
        bench.end(filler)
    request = bench.ask("a")
    tried = set()
    for _ in range(3):
        tried.add(bench.books.running[request])
        bench.notice(request, FailureSign.UNREACHED)
    assert len(tried) == 3
    assert {bench.books.running[request]} == replicas - tried


def test_a_request_that_reaches_no_replica_is_told_so_at_its_deadline() -> None:
    bench = bench_with(queue_s_max=25.0)
    request = bench.ask("a")
    bench.start()
    for _ in range(3):
        bench.notice(request, FailureSign.UNREACHED)
        bench.wait(11.0)
    rejected = bench.books.rejected[request]
    assert rejected.why is Refusal.TOO_LATE
    assert rejected.reason.startswith("all its replicas have just failed requests: a on n")


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_full_queue_of_a_model_is_told_with_a_time_to_come_back() -> None:
    bench = bench_with(queue_max=2)
    bench.deploy("b", queue_max=2)
    requests = [bench.ask("a") for _ in range(3)]
    rejected = bench.books.rejected[requests[2]]
    assert (rejected.why, list(bench.books.waiting)) == (Refusal.QUEUE_FULL, requests[:2])
    assert rejected.retry_after_s is not None
    assert rejected.retry_after_s > 0
    assert bench.ask("b") in bench.books.waiting


def test_a_full_router_is_told_with_a_time_to_come_back() -> None:
    bench = RouterBench(RouterLimits(waiting_max=2))
    bench.node("n", 1)
    for name in ("a", "b", "c"):
        bench.deploy(name)
    requests = [bench.ask(name) for name in ("a", "b", "c")]
    rejected = bench.books.rejected[requests[2]]
    assert rejected.why is Refusal.QUEUE_FULL
    assert "all models" in rejected.reason
    assert rejected.retry_after_s is not None


def test_a_request_is_sent_to_so_many_replicas_and_then_told() -> None:
    bench = bench_with(num_slots=2, max_replicas=2)
    request = bench.ask("a")
    for _ in range(2):
        bench.crash(bench.start())
        bench.wait(1.0)
        bench.notice(request, FailureSign.REFUSED)
        bench.wait(1.0)
    assert bench.books.rejected[request].why is Refusal.ENGINE_FAILED


def test_no_more_requests_are_sent_to_a_replica_and_no_more_replicas_started_than_may_be() -> None:
    bench = bench_with(num_slots=4, max_replicas=2, target_ongoing=1, ongoing_max=3)
    requests = [bench.ask("a") for _ in range(8)]
    while bench.starting:
        bench.start()
    assert sorted(bench.books.running.values()) == sorted(list(bench.ready) * 3)
    assert list(bench.books.waiting) == requests[6:]


def test_a_smaller_queue_sends_nobody_away_who_waits_already() -> None:
    bench = bench_with(queue_max=4)
    requests = [bench.ask("a") for _ in range(4)]
    bench.deploy("a", queue_max=1)
    assert list(bench.books.waiting) == requests
    assert bench.ask("a") in bench.books.rejected


def test_a_smaller_router_sends_nobody_away_who_waits_already() -> None:
    bench = bench_with()
    requests = [bench.ask("a") for _ in range(4)]
    bench.core.queues.set_total_max(2)
    assert bench.ask("a") in bench.books.rejected
    assert list(bench.books.waiting) == requests
    bench.start()
    assert bench.ask("a") in bench.books.running


# ---------------------------------------------------------------------------------------------------- time and deletion


def test_an_idle_replica_that_was_kept_ends_when_it_need_not_be_kept_any_more() -> None:
    bench = bench_with(min_replicas=1, keep_alive_s=5.0)
    replica = bench.start()
    bench.wait(100.0)
    assert not bench.stopping
    bench.deploy("a", min_replicas=0, keep_alive_s=5.0)
    bench.wait(0.25)
    assert bench.stopping == {replica: "n"}


def test_a_shorter_keep_alive_counts_at_once() -> None:
    bench = bench_with(keep_alive_s=1000.0)
    request = bench.ask("a")
    bench.start()
    bench.end(request)
    bench.deploy("a", keep_alive_s=5.0)
    bench.wait(5.0)
    assert bench.stopping


def asked_seven_times_in_a_row(num_slots: int) -> RouterBench:
    """After seven quick requests, on an engine whose start takes 20 s."""
    bench = bench_with(num_slots=num_slots)
    for number in range(7):
        request = bench.ask("a")
        if not number:
            bench.start(seconds=20.0, took_s=20.0)
        bench.now_s += 0.5
        bench.end(request)
    return bench


def test_a_burst_does_not_end_the_only_engine_while_no_other_model_wants_its_slot() -> None:
    bench = asked_seven_times_in_a_row(num_slots=1)
    for _ in range(100):
        bench.wait(1.0)
    assert not bench.stopping
    assert bench.ask("a") in bench.books.running


def test_another_model_gets_the_slot_of_an_engine_that_idles_within_its_keep_alive() -> None:
    bench = asked_seven_times_in_a_row(num_slots=1)
    bench.deploy("b")
    bench.ask("b")
    assert list(bench.stopping.values()) == ["n"]


def test_a_prefetch_is_for_the_next_burst_and_not_within_one() -> None:
    bench = RouterBench()
    bench.node("n", 1, a=Tier.DISK)
    bench.deploy("a", keep_alive_s=0.0)
    for pause_s in (1200.0, 1200.0, 0.0):
        requests = [bench.ask("a") for _ in range(8)]
        bench.start()
        for request in requests:
            bench.end(request)
        bench.wait(0.25)
        bench.stopped()
        bench.now_s += pause_s
    told = [action for _ in range(300) for action in bench.wait(5.0)]
    assert PrefetchModel("a", "n") in told


def test_a_model_deleted_while_it_starts_leaves_nothing() -> None:
    bench = bench_with()
    request = bench.ask("a")
    (replica,) = bench.starting
    bench.delete("a")
    assert bench.books.rejected[request].why is Refusal.DELETED
    bench.stopped(replica)
    assert not bench.core.cluster.replicas
    assert not bench.core.scaling.predictions
    bench.wait(1000.0)
    assert not bench.starting


def test_a_model_deleted_and_deployed_again_while_it_starts_gets_a_replica_of_its_own() -> None:
    bench = bench_with(num_slots=2)
    bench.ask("a")
    (first,) = bench.starting
    bench.delete("a")
    bench.deploy("a")
    request = bench.ask("a")
    (second,) = bench.starting
    assert second != first
    bench.stopped(first)
    bench.start(second)
    assert bench.books.running == {request: second}


def test_what_is_to_be_looked_at_later_does_not_grow_with_requests() -> None:
    bench = bench_with(keep_alive_s=3600.0)
    request = bench.ask("a")
    bench.start()
    bench.end(request)
    for _ in range(2000):
        bench.now_s += 1.0
        bench.end(bench.ask("a"))
    foresight = bench.core.scaling.foresight
    assert (len(foresight._idle), len(foresight._prefetches)) == (1, 0)


def test_a_prefetch_is_for_the_newest_arrival() -> None:
    bench = RouterBench()
    bench.node("n", 1, a=Tier.DISK)
    bench.deploy("a", keep_alive_s=0.0)
    for gap_s in (100.0, 100.0, 0.0):
        request = bench.ask("a")
        bench.start()
        bench.end(request)
        bench.wait(0.25)
        bench.stopped()
        bench.now_s += gap_s
    told = [(bench.now_s, action) for _ in range(40) for action in bench.wait(5.0)]
    ((at_s, action),) = [entry for entry in told if isinstance(entry[1], PrefetchModel)]
    assert action == PrefetchModel("a", "n")
    assert 200.0 < at_s < 300.0


def test_alarms_ring_once_at_their_last_time() -> None:
    alarms = Alarms()
    alarms.set("a", 5.0)
    alarms.set("a", 9.0)
    alarms.set("b", 5.0)
    alarms.set("c", 9.0)
    alarms.set("c", 4.0)
    alarms.set("d", 1.0)
    alarms.discard("d")
    assert list(alarms.due(5.0)) == ["c", "b"]
    assert list(alarms.due(8.9)) == []
    assert list(alarms.due(9.0)) == ["a"]
    assert (list(alarms.due(1e9)), len(alarms)) == ([], 0)


def test_a_tick_of_an_empty_router_does_nothing() -> None:
    assert RouterBench().tell(Ticked()) == []
