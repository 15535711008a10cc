"""The simulated world by cases that can be computed by hand, and what it never lets a policy do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from sllm_vllm.router.core.events import (
    Dispatch,
    Event,
    FirstByte,
    MoveRequest,
    NodeJoined,
    NodeLost,
    NodeReported,
    PrefetchModel,
    Refusal,
    RejectRequest,
    ReplicaEnded,
    ReplicaReady,
    RequestArrived,
    RequestEnded,
    RequestFailed,
    RequestGone,
    StartReplica,
    StopReplica,
    Ticked,
)
from sllm_vllm.router.core.facts import Tier
from sllm_vllm.simulate.hardware import FaultRates
from sllm_vllm.simulate.machines import keep
from sllm_vllm.simulate.policy import Order, PreemptRequest
from sllm_vllm.simulate.run import End, Run
from sllm_vllm.simulate.world import World
from tests.simulate.scripted import ONE, SMALL, Scripted, asked
from tests.support.cases import every_case

GIVEN_UP = RejectRequest("r0", Refusal.NO_START, "test")
Answer = Callable[[Event, float], Sequence[Order]]


def start(replica: str, model: str = "m-0", node: str = "n0000") -> StartReplica:
    return StartReplica(replica, model, 0, node)


def serving(*starts: StartReplica) -> Answer:
    """Start these when the first request arrives; send each request to the replica of its number, or the only one."""
    pending: list[str] = []
    ready: set[str] = set()

    def send(request: str) -> list[Order]:
        replica = starts[min(int(request[1:]), len(starts) - 1)].replica
        return [Dispatch(request, replica, 1)] if replica in ready else []

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, RequestArrived):
            pending.append(event.facts.id)
            return (list(starts) if len(pending) == 1 else []) + send(event.facts.id)
        if isinstance(event, ReplicaReady):
            ready.add(event.replica)
            return [
                order
                for request in pending
                for order in send(request)
                if isinstance(order, Dispatch) and order.replica == event.replica
            ]
        return []

    return answer


def times(run: Run, request: str) -> tuple[float, float, float]:
    """Dispatch, first token, end."""
    outcome = run.outcomes[request]
    assert outcome.dispatched_s is not None
    assert outcome.first_s is not None
    assert outcome.ended_s is not None
    return outcome.dispatched_s, outcome.first_s, outcome.ended_s


def test_start_takes_process_then_load_then_init() -> None:
    policy = Scripted(serving(start("a")))
    run = World(ONE, policy, seed=1, is_validated=True).run([asked(0)])
    assert policy.times_of(ReplicaReady) == [1.0 + 5.0 + 2.0]
    assert times(run, "r0") == pytest.approx((8.0, 9.0, 11.0))
    assert run.outcomes["r0"].is_cold


def test_loads_of_a_node_go_one_after_another() -> None:
    policy = Scripted(serving(start("a"), start("b", "m-1")))
    World(ONE, policy, seed=1).run([asked(0), asked(1, model="m-1")])
    assert policy.times_of(ReplicaReady) == [8.0, 1.0 + 5.0 + 5.0 + 2.0]
    samples = [event.sample for event in policy.all_of(ReplicaReady) if isinstance(event, ReplicaReady)]
    assert [sample.weights_s for sample in samples if sample is not None] == [5.0, 5.0]


def test_loads_of_two_nodes_go_side_by_side() -> None:
    policy = Scripted(serving(start("a"), start("b", "m-1", "n0001")))
    World(SMALL, policy, seed=1).run([asked(0), asked(1, model="m-1")])
    assert policy.times_of(ReplicaReady) == [8.0, 8.0]


def test_second_load_of_a_model_reads_memory() -> None:
    policy = Scripted(serving(start("a"), start("b")))
    World(ONE, policy, seed=1).run([asked(0), asked(1)])
    assert policy.times_of(ReplicaReady) == [8.0, 1.0 + 5.0 + 1.0 + 2.0]


def test_model_that_no_disk_has_is_fetched() -> None:
    policy = Scripted(serving(start("a", "m-1")))
    World(replace(SMALL, on_disk=1), policy, seed=1).run([asked(0, model="m-1")])
    reports = [event for event in policy.all_of(NodeReported) if isinstance(event, NodeReported)]
    assert [set(report.residency) for report in reports[:2]] == [{"m-0", "m-2"}, {"m-1", "m-3"}]
    assert policy.times_of(ReplicaReady) == [1.0 + 10.0 + 2.0]


def test_node_reports_what_a_load_left_in_memory() -> None:
    policy = Scripted(serving(start("a")))
    World(ONE, policy, seed=1).run([asked(0)])
    last = policy.all_of(NodeReported)[-1]
    assert isinstance(last, NodeReported)
    assert last.residency == {"m-0": Tier.HOST, "m-1": Tier.DISK, "m-2": Tier.DISK, "m-3": Tier.DISK}
    assert last.hops == {Tier.HOST: 10_000.0, Tier.DISK: 2_000.0, Tier.REMOTE: 1_000.0}


def test_cache_drops_the_least_recently_used() -> None:
    cache = OrderedDict[str, int]()
    for model in ("a", "b", "a", "c"):
        keep(cache, 20, model, nbytes=10)
    assert list(cache) == ["a", "c"]


def test_cache_does_not_take_what_is_larger_than_itself() -> None:
    cache = OrderedDict[str, int](a=10)
    keep(cache, 20, "b", nbytes=30)
    assert list(cache) == ["a"]


def test_prompts_queue_and_batches_slow_down() -> None:
    """Both are sent at 8. Prefills end at 9 and 10. At 10, r0 has 10 of its 20 tokens; then both go at 0.15 s a token.
    So r0 ends at 11.5, when r1 has 10 left, which alone take 1 s."""
    run = World(ONE, Scripted(serving(start("a"))), seed=1).run([asked(0), asked(1)])
    assert times(run, "r0") == pytest.approx((8.0, 9.0, 11.5))
    assert times(run, "r1") == pytest.approx((8.0, 10.0, 12.5))


def test_request_on_a_ready_replica_is_not_cold() -> None:
    run = World(ONE, Scripted(serving(start("a"))), seed=1).run([asked(0), asked(1, at_s=20.0)])
    assert times(run, "r1") == pytest.approx((20.0, 21.0, 23.0))
    assert not run.outcomes["r1"].is_cold


def test_slots_are_paid_from_the_order_on() -> None:
    run = World(ONE, Scripted(serving(start("a"))), seed=1).run([asked(0)])
    assert run.accelerator_s == pytest.approx(11.0)


def test_stop_frees_slots_when_it_is_done() -> None:
    inner = serving(start("a"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, RequestEnded):
            return [StopReplica("a", "n0000", "test")]
        if isinstance(event, RequestArrived) and event.facts.id == "r1":
            return [RejectRequest("r1", Refusal.NO_START, "test")]
        return inner(event, now_s)

    policy = Scripted(answer)
    run = World(ONE, policy, seed=1, is_validated=True).run([asked(0), asked(1, at_s=20.0)])
    assert policy.times_of(ReplicaEnded) == [11.0 + 0.25]
    assert run.accelerator_s == pytest.approx(11.25)


def test_prefetch_makes_the_start_read_memory() -> None:
    inner = serving(start("a"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        fetched = [PrefetchModel("m-0", "n0000")] if isinstance(event, NodeJoined) else []
        return [*fetched, *inner(event, now_s)]

    policy = Scripted(answer)
    World(ONE, policy, seed=1).run([asked(0, at_s=10.0)])
    assert policy.times_of(ReplicaReady) == [10.0 + 1.0 + 1.0 + 2.0]


def fetching(*models: str, inner: Answer) -> Answer:
    """Have these models read ahead when the node joins."""

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        fetched = [PrefetchModel(model, "n0000") for model in models] if isinstance(event, NodeJoined) else []
        return [*fetched, *inner(event, now_s)]

    return answer


def fetched_at(policy: Scripted) -> dict[str, float]:
    """When a model was reported to be in memory first."""
    found: dict[str, float] = {}
    for at_s, event in policy.story:
        for model, tier in event.residency.items() if isinstance(event, NodeReported) else ():
            if tier is Tier.HOST:
                found.setdefault(model, at_s)
    return found


def test_loads_go_before_a_prefetch_that_is_under_way() -> None:
    """It would be read at 5. The load begins at 4 and takes 5 s, so a second of it is left at 9."""
    policy = Scripted(fetching("m-1", inner=serving(start("a"))))
    World(ONE, policy, seed=1).run([asked(0, at_s=3.0)])
    assert policy.times_of(ReplicaReady) == [3.0 + 1.0 + 5.0 + 2.0]
    assert fetched_at(policy) == {"m-0": 9.0, "m-1": 10.0}


def test_prefetches_are_read_one_after_another() -> None:
    policy = Scripted(fetching("m-0", "m-1", "m-0", inner=serving(start("a"))))
    run = World(ONE, policy, seed=1).run([asked(0, at_s=20.0)])
    assert fetched_at(policy) == {"m-0": 5.0, "m-1": 10.0}
    assert run.num_prefetches == 2


def test_prefetch_drops_nothing_from_memory() -> None:
    policy = Scripted(fetching("m-0", "m-1", "m-2", inner=serving(start("a"))))
    run = World(ONE, policy, seed=1).run([asked(0, at_s=20.0)])
    assert set(fetched_at(policy)) == {"m-0", "m-1"}
    assert run.num_prefetches == 2


def test_node_that_is_lost_forgets_its_prefetches() -> None:
    failing = replace(ONE, failures=FaultRates(losses_per_hour=3600 * 2.0, node_back_s=100.0, noise_sigma=0.0))
    policy = Scripted(fetching("m-0", inner=lambda event, now_s: [GIVEN_UP] if isinstance(event, NodeLost) else []))
    run = World(failing, policy, seed=1).run([asked(0)])
    assert run.num_losses == 1
    assert (fetched_at(policy), run.num_prefetches) == ({}, 0)


def test_wait_is_made_of_slots_start_and_room() -> None:
    """The only slot of a busy replica: the second request waits for its start first, and then for its room."""
    run = World(ONE, Scripted(serving(start("a"))), seed=1).run([asked(0), asked(1, at_s=1.0)])
    assert run.outcomes["r0"].waits_s == (0.0, 8.0, 0.0)
    assert run.outcomes["r1"].waits_s == (0.0, 7.0, 0.0)


def test_moved_request_goes_on_where_it_was() -> None:
    """The order comes at 9 with the first token. In the second of recomputing, the source makes 10 tokens."""
    inner = serving(start("a"), start("b", "m-0", "n0001"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        return [MoveRequest("r0", "a", "b")] if isinstance(event, FirstByte) else inner(event, now_s)

    run = World(SMALL, Scripted(answer), seed=1, is_validated=True).run([asked(0)])
    assert times(run, "r0") == pytest.approx((8.0, 9.0, 11.0))
    assert (run.num_moves, run.outcomes["r0"].replica) == (1, "b")
    assert run.num_recomputed_tokens == 50 + 10


def test_preempted_request_begins_again() -> None:
    inner = serving(start("a"))
    again: list[float] = []

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, FirstByte) and not again:
            again.append(now_s)
            return [PreemptRequest("r0", "a"), Dispatch("r0", "a", 2)]
        return inner(event, now_s)

    run = World(ONE, Scripted(answer), seed=1, is_validated=True).run([asked(0)])
    assert again == [9.0]
    assert times(run, "r0") == pytest.approx((9.0, 10.0, 12.0))


def test_crash_fails_requests_without_a_token_and_breaks_the_others() -> None:
    failing = replace(ONE, failures=replace(ONE.failures, crashes_per_hour=1500.0))
    ends = set[End | None]()
    for seed in range(20):
        run = World(failing, Scripted(_crashing()), seed=seed, is_validated=True).run([asked(0)])
        run.validate(1)
        ends.add(run.outcomes["r0"].end)
    assert ends == {End.ANSWERED, End.BROKEN, End.REJECTED}


def _crashing() -> Answer:
    inner = serving(start("a"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, RequestFailed):
            return [RejectRequest(event.request, Refusal.ENGINE_FAILED, event.reason)]
        return inner(event, now_s)

    return answer


def test_start_that_fails_says_so() -> None:
    failing = replace(ONE, failures=FaultRates(start_share=1.0, noise_sigma=0.0, outlier_share=0.0))
    inner = serving(start("a"))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        return [GIVEN_UP] if isinstance(event, ReplicaEnded) else inner(event, now_s)

    policy = Scripted(answer)
    run = World(failing, policy, seed=1).run([asked(0)])
    ended = policy.all_of(ReplicaEnded)[0]
    assert isinstance(ended, ReplicaEnded)
    assert ended.is_fault
    assert (run.outcomes["r0"].end, run.num_start_failures) == (End.REJECTED, 1)


def test_lost_node_comes_back_without_its_memory() -> None:
    losing = replace(ONE, failures=replace(ONE.failures, losses_per_hour=60.0, node_back_s=30.0))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        return [GIVEN_UP] if isinstance(event, Ticked) and policy.times_of(NodeLost) and now_s > joined() else []

    def joined() -> float:
        return policy.times_of(NodeLost)[0] + 30.0

    policy = Scripted(answer)
    World(losing, policy, seed=1, is_validated=True).run([asked(0)])
    assert policy.times_of(NodeJoined)[1] == pytest.approx(joined())
    reports = [event for event in policy.all_of(NodeReported) if isinstance(event, NodeReported)]
    assert Tier.HOST not in reports[-1].residency.values()


def test_start_on_a_lost_node_ends_at_once() -> None:
    losing = replace(ONE, failures=replace(ONE.failures, losses_per_hour=60.0))

    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, NodeLost):
            return [start("a")]
        return [GIVEN_UP] if isinstance(event, ReplicaEnded) else []

    policy = Scripted(answer)
    World(losing, policy, seed=1, is_validated=True).run([asked(0)])
    assert policy.all_of(ReplicaEnded) == [ReplicaEnded("a", "its node is gone", is_fault=True)]


def test_client_that_leaves_is_taken_from_its_replica() -> None:
    leaving = replace(ONE, failures=replace(ONE.failures, leave_share=1.0, leave_s_max=10.0))
    policy = Scripted(serving(start("a")))
    run = World(leaving, policy, seed=3, is_validated=True).run([asked(0)])
    assert run.outcomes["r0"].end is End.LEFT
    assert len(policy.all_of(RequestGone)) == 1


def test_request_that_nobody_answers_is_counted_as_lost() -> None:
    run = World(ONE, Scripted(lambda event, now_s: []), seed=1).run([asked(0)])
    with pytest.raises(AssertionError, match="1 requests never ended, the first of them r0"):
        run.validate(1)


@every_case(
    "orders, message",
    [
        ([start("a"), start("b"), start("c")], "c has no 1 free slots"),
        ([start("a"), start("a")], "started twice"),
        ([GIVEN_UP, GIVEN_UP], "ended twice"),
    ],
)
def test_impossible_order_is_refused(orders: list[Order], message: str) -> None:
    policy = Scripted(lambda event, now_s: orders if isinstance(event, RequestArrived) else [])
    with pytest.raises(AssertionError, match=message):
        World(ONE, policy, seed=1).run([asked(0)])


@every_case(
    "orders, message",
    [
        ([Dispatch("r0", "a", 1), Dispatch("r0", "a", 2)], "sent twice"),
        ([Dispatch("r0", "a", 1), StopReplica("a", "n0000", "test")], "stopped with"),
        ([Dispatch("r0", "a", 1), GIVEN_UP], "rejected on a"),
        ([Dispatch("r1", "a", 1)], "sent to m-0"),
    ],
)
def test_impossible_order_to_a_ready_replica_is_refused(orders: list[Order], message: str) -> None:
    def answer(event: Event, now_s: float) -> Sequence[Order]:
        if isinstance(event, RequestArrived):
            return [start("a")] if event.facts.id == "r0" else []
        return orders if isinstance(event, ReplicaReady) else []

    with pytest.raises(AssertionError, match=message):
        World(ONE, Scripted(answer), seed=1).run([asked(0), asked(1, model="m-1")])


def test_replica_takes_no_more_than_its_most() -> None:
    narrow = replace(ONE, serving=replace(ONE.serving, ongoing_max=1))
    with pytest.raises(AssertionError, match="has 1 requests already"):
        World(narrow, Scripted(serving(start("a"))), seed=1).run([asked(0), asked(1)])
