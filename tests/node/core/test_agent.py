"""The node's rules one by one: orders, lives, limits, clocks. Events in, actions out."""

from __future__ import annotations

import pytest

from sllm_vllm.node.core.agent import AgentCore, AgentLimits
from sllm_vllm.node.core.events import (
    Action,
    EngineExited,
    EngineHealthy,
    EngineNotStarted,
    EngineStarted,
    KillEngine,
    RefuseOrder,
    ReplicaOrdered,
    ReplicaSpec,
    StartEngine,
    StopAsked,
    TellState,
    TerminateEngine,
)
from sllm_vllm.node.core.replica import ReplicaRow, State
from tests.node.core.agent_bench import LIMITS, Bench, spec, told
from tests.support.cases import every_case

ALIVE = [State.STARTING, State.LOADING, State.READY, State.UNWELL]
HAS_PROCESS = [State.LOADING, State.READY, State.UNWELL, State.STOPPING]


def refusal(actions: list[Action]) -> str:
    (action,) = actions
    assert isinstance(action, RefuseOrder)
    return action.reason


# ------------------------------------------------------------------------------------------------------------ orders


def test_an_order_gets_the_lowest_slots_and_its_engine_is_started() -> None:
    assert Bench(4).order("a", 2) == [TellState("a", "starting"), StartEngine(spec("a", 2), (0, 1))]


def test_a_start_goes_through_its_states() -> None:
    bench = Bench()
    bench.order("a")
    assert bench.tell(EngineStarted("a", 7)) == [TellState("a", "loading")]
    assert bench.tell(EngineHealthy("a")) == [TellState("a", "ready")]
    assert bench.core.snapshot() == (ReplicaRow("a", "model-a", State.READY, (0,), 7, bench.now_s, "", None),)


def test_the_same_order_again_changes_nothing() -> None:
    bench = Bench()
    bench.reach("a", State.LOADING)
    assert bench.order("a") == []
    assert bench.row("a").state is State.LOADING


def test_a_waiting_order_can_be_told_again_too() -> None:
    bench = Bench(1)
    bench.order("a")
    bench.order("b", waits=True)
    assert bench.order("b", waits=True) == []
    assert list(bench.core.waiting) == ["b"]


def test_another_spec_under_the_same_id_is_refused() -> None:
    bench = Bench()
    bench.reach("a", State.READY)
    assert refusal(bench.order("a", 2)) == "a was ordered with another spec: order under a new id"
    assert bench.row("a").state is State.READY


def test_an_order_may_take_the_id_of_a_replica_that_has_ended() -> None:
    bench = Bench()
    bench.reach("a", State.STOPPING)
    bench.tell(EngineExited("a", 0))
    bench.order("b")
    again = ReplicaOrdered(ReplicaSpec("a", "other"), waits=False, reuses_id=True)
    actions = bench.tell(again)
    assert StartEngine(again.spec, bench.core.slots.held_by("a")) in actions
    assert [row.id for row in bench.core.snapshot()] == ["b", "a"]
    assert bench.row("a").state is State.STARTING
    bench.core.validate()


def test_the_id_of_a_replica_that_lives_is_taken_by_no_other() -> None:
    bench = Bench()
    bench.reach("a", State.STOPPING)
    again = ReplicaOrdered(ReplicaSpec("a", "other"), waits=False, reuses_id=True)
    assert refusal(bench.tell(again)) == "a was ordered with another spec: order under a new id"


def test_an_id_that_is_stopping_or_has_ended_is_refused() -> None:
    bench = Bench()
    bench.reach("a", State.STOPPING)
    assert refusal(bench.order("a")) == "a is stopping: order under a new id"
    bench.tell(EngineExited("a", 0))
    assert refusal(bench.order("a")) == "a is stopped: order under a new id"


@every_case("num_slots", [0, -1, 3])
def test_slots_that_the_node_can_never_give_are_refused_at_once(num_slots: int) -> None:
    bench = Bench(2)
    assert refusal(bench.order("a", num_slots, waits=True)) == f"it wants {num_slots} slots, this node has 2"
    assert bench.core.snapshot() == ()


def test_no_free_slots_and_nobody_who_waits_is_a_refusal() -> None:
    bench = Bench(1)
    bench.order("a")
    assert refusal(bench.order("b")) == "1 of 1 slots wanted, 0 free; 0 orders wait"


def test_an_order_that_waits_is_started_when_slots_are_free() -> None:
    bench = Bench(1)
    bench.reach("a", State.READY)
    reason = "1 of 1 slots wanted, 0 free; 0 orders are before it"
    assert bench.order("b", waits=True) == [TellState("b", "waiting", reason)]
    assert bench.tell(EngineExited("a", 0)) == [
        TellState("a", "failed", "exited with status 0"),
        TellState("b", "starting"),
        StartEngine(spec("b"), (0,)),
    ]


def test_no_more_than_orders_max_wait() -> None:
    bench = Bench(1)
    for name in "abcd":
        bench.order(name, waits=True)
    assert refusal(bench.order("e", waits=True)) == "3 orders wait already, no more than 3 may"


def test_twenty_orders_at_once_are_started_in_order() -> None:
    bench = Bench(2, AgentLimits(orders_max=18))
    for number in range(20):
        bench.order(f"r{number}", waits=True)
    started = [row.id for row in bench.core.snapshot() if row.state is State.STARTING]
    while bench.core.waiting:
        actions = bench.tell(EngineNotStarted(started[-2], "no memory"))
        started += [action.spec.id for action in actions if isinstance(action, StartEngine)]
    assert started == [f"r{number}" for number in range(20)]


def test_a_smaller_order_does_not_overtake_a_larger_one() -> None:
    bench = Bench(2)
    bench.reach("a", State.READY)
    bench.order("large", 2, waits=True)
    assert told(bench.order("small", waits=True)) == [("small", "waiting")]
    assert refusal(bench.order("impatient")) == "1 of 2 slots wanted, 1 free; 2 orders wait"
    bench.tell(EngineExited("a", 1))
    assert bench.states()["large"] is State.STARTING
    assert bench.states()["small"] is State.WAITING


def test_those_behind_a_large_order_are_started_when_it_is_withdrawn() -> None:
    bench = Bench(2)
    bench.reach("a", State.READY)
    bench.order("large", 2, waits=True)
    bench.order("small", waits=True)
    actions = bench.tell(StopAsked("large"))
    assert told(actions) == [("large", "stopped"), ("small", "starting")]


def test_the_core_needs_no_slots() -> None:
    core = AgentCore(0, LIMITS)
    assert refusal(core.handle(ReplicaOrdered(ReplicaSpec("a", "m"), waits=True), 0.0))


# -------------------------------------------------------------------------------------------------------------- ends


@every_case("state", ALIVE)
def test_a_replica_with_slots_is_asked_to_end_and_keeps_them(state: State) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    assert bench.tell(StopAsked("a")) == [TellState("a", "stopping", "stop asked"), TerminateEngine("a")]
    assert bench.row("a").slots == (0,)


@every_case("state", [*ALIVE, State.STOPPING])
def test_to_ask_twice_is_harmless(state: State) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    bench.tell(StopAsked("a"))
    assert bench.tell(StopAsked("a")) == []
    bench.tell(EngineExited("a", -15))
    assert bench.tell(StopAsked("a")) == []
    assert bench.row("a").state is State.STOPPED


def test_to_stop_what_is_not_known_is_harmless() -> None:
    assert Bench().tell(StopAsked("a")) == []


@every_case("status", [0, 1, -9])
def test_an_engine_that_ends_after_it_was_asked_is_stopped(status: int) -> None:
    bench = Bench(1)
    bench.reach("a", State.STOPPING)
    assert bench.tell(EngineExited("a", status)) == [TellState("a", "stopped", "stop asked")]
    assert bench.row("a") == ReplicaRow("a", "model-a", State.STOPPED, (), None, bench.now_s, "stop asked", status)


@every_case("state", ALIVE)
def test_an_engine_killed_in_any_phase_has_failed_and_its_slots_are_free(state: State) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    bench.tell(EngineExited("a", -9))
    row = bench.row("a")
    assert (row.state, row.status, row.slots) == (State.FAILED, -9, ())
    assert row.reason.startswith("ended by signal 9")
    assert told(bench.order("b")) == [("b", "starting")]


@every_case("status", [1, 2])
def test_a_bad_argument_is_a_failure_with_its_status(status: int) -> None:
    bench = Bench(1)
    bench.reach("a", State.LOADING)
    reason = f"exited with status {status} before it was healthy"
    assert bench.tell(EngineExited("a", status)) == [TellState("a", "failed", reason)]
    assert bench.row("a").status == status


def test_a_replica_without_a_process_has_failed() -> None:
    bench = Bench(1)
    bench.order("a")
    assert bench.tell(EngineNotStarted("a", "the port is taken")) == [TellState("a", "failed", "the port is taken")]
    assert bench.core.slots.num_free == 1


def test_a_start_that_is_called_off_in_time_is_stopped() -> None:
    bench = Bench(1)
    bench.order("a")
    bench.tell(StopAsked("a"))
    assert told(bench.tell(EngineNotStarted("a", "called off"))) == [("a", "stopped")]


def test_a_process_that_comes_although_it_was_called_off_is_asked_to_end() -> None:
    bench = Bench(1)
    bench.order("a")
    bench.tell(StopAsked("a"))
    assert bench.tell(EngineStarted("a", 7)) == [TerminateEngine("a")]
    assert bench.row("a").pid == 7
    assert bench.tell(EngineHealthy("a")) == []


def test_a_process_without_slots_is_killed() -> None:
    bench = Bench(1)
    assert bench.tell(EngineStarted("unknown", 7)) == [KillEngine("unknown")]
    bench.order("a")
    bench.tell(EngineNotStarted("a", "no answer from the warm parent"))
    bench.order("b")
    assert bench.tell(EngineStarted("a", 8)) == [KillEngine("a")]
    assert bench.tell(EngineExited("a", -9)) == []
    assert bench.row("a").status is None


@every_case("state", HAS_PROCESS)
def test_a_second_process_is_a_programmers_error(state: State) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    with pytest.raises(AssertionError, match="a runs as process 7, and now as 8"):
        bench.tell(EngineStarted("a", 8))


def test_only_the_last_that_ended_are_remembered() -> None:
    bench = Bench(1)
    for name in "abcde":
        bench.order(name)
        bench.tell(EngineNotStarted(name, ""))
    assert [row.id for row in bench.core.snapshot()] == ["c", "d", "e"]
    assert bench.row("e").reason == "it did not start"
    assert (bench.core.row("a"), bench.core.story("a")) == (None, [])
