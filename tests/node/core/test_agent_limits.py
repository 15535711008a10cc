"""Health, limits of time, jumps of the clock, and what is remembered. Events in, actions out."""

from __future__ import annotations

import pytest

from sllm_vllm.node.core.agent import AgentLimits
from sllm_vllm.node.core.events import (
    AgentTicked,
    EngineExited,
    EngineHealthy,
    EngineNotStarted,
    EngineStarted,
    EngineUnhealthy,
    KillEngine,
    ReplicaOrdered,
    StartEngine,
    StopAsked,
    TellState,
)
from sllm_vllm.node.core.replica import STARTED_ONCE, STORY_MAX, State
from tests.node.core.agent_bench import Bench, spec, told
from tests.support.cases import every_case

HAS_PROCESS = [State.LOADING, State.READY, State.UNWELL, State.STOPPING]


# ------------------------------------------------------------------------------------------------------------ health


def test_one_missed_answer_is_no_end() -> None:
    bench = Bench()
    bench.reach("a", State.READY)
    assert bench.tell(EngineUnhealthy("a", "timed out")) == [TellState("a", "unwell", "timed out")]
    assert bench.tell(EngineUnhealthy("a", "")) == []
    assert bench.row("a").reason == "no healthy answer"
    assert bench.tell(EngineHealthy("a")) == [TellState("a", "ready")]


def test_answers_missed_in_a_row_are_a_hang_and_the_slots_stay_taken_until_it_is_gone() -> None:
    bench = Bench()
    bench.reach("a", State.UNWELL)
    bench.tell(EngineUnhealthy("a", "timed out"))
    reason = "hung: 3 health answers missed in a row, the last one: timed out"
    assert bench.tell(EngineUnhealthy("a", "timed out")) == [TellState("a", "stopping", reason), KillEngine("a")]
    assert bench.row("a").slots == (0,)
    assert bench.tell(StopAsked("a"), EngineUnhealthy("a", "timed out")) == []
    assert bench.tell(EngineExited("a", -9)) == [TellState("a", "failed", reason)]


def test_an_answer_between_starts_the_count_again() -> None:
    bench = Bench()
    bench.reach("a", State.READY)
    for _ in range(3):
        bench.tell(EngineUnhealthy("a", "x"), EngineUnhealthy("a", "x"), EngineHealthy("a"))
    assert bench.row("a").state is State.READY


def test_one_miss_may_be_enough() -> None:
    bench = Bench(limits=AgentLimits(unwell_max=1))
    bench.reach("a", State.READY)
    assert KillEngine("a") in bench.tell(EngineUnhealthy("a", "x"))


def test_no_answer_before_it_was_healthy_is_no_news() -> None:
    bench = Bench()
    bench.reach("a", State.LOADING)
    for _ in range(9):
        assert bench.tell(EngineUnhealthy("a", "refused"), EngineUnhealthy("unknown", "refused")) == []


# ---------------------------------------------------------------------------------------------------- limits, clocks


@every_case("state, reason", [(State.STARTING, "no process within 60 s"), (State.LOADING, "not healthy within 60 s")])
def test_a_start_that_takes_too_long_is_killed_and_has_failed(state: State, reason: str) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    assert bench.tick(59) == []
    assert bench.tick(2) == [TellState("a", "stopping", reason), KillEngine("a")]
    gone = EngineNotStarted("a", "called off") if state is State.STARTING else EngineExited("a", -9)
    assert bench.tell(gone) == [TellState("a", "failed", reason)]


def test_an_engine_that_does_not_end_is_killed_again_and_again() -> None:
    bench = Bench(1)
    bench.reach("a", State.STOPPING)
    assert bench.tick(9) == []
    assert bench.tick(2) == [KillEngine("a")]
    assert bench.tick(11) == [KillEngine("a")]
    assert told(bench.tell(EngineExited("a", -9))) == [("a", "stopped")]


def test_who_waits_for_slots_or_is_ready_waits_for_ever() -> None:
    bench = Bench(1)
    bench.reach("a", State.READY)
    bench.order("b", waits=True)
    assert bench.tick(1000) == []


@every_case("state", HAS_PROCESS)
@every_case("seconds", [1e6, -1e6])
def test_a_jump_of_the_clock_ends_nobody(state: State, seconds: float) -> None:
    bench = Bench(1)
    bench.reach("a", state)
    assert bench.jump(seconds) == []
    assert bench.tell(*[AgentTicked()] * 20) == []


def test_limits_go_on_after_a_jump() -> None:
    bench = Bench(1)
    bench.reach("a", State.LOADING)
    bench.tick(30)
    bench.jump(1e6)
    assert bench.tick(25) == []
    assert KillEngine("a") in bench.tick(6)


def test_limits_are_looked_at_when_time_is_told_to_pass_alone() -> None:
    bench = Bench(1)
    bench.reach("a", State.LOADING)
    for _ in range(100):
        bench.now_s += 1
        assert bench.tell(EngineUnhealthy("a", "refused")) == []
    assert KillEngine("a") in bench.tell(AgentTicked())


@every_case(
    "limits", [{"tick_max_s": 20.0}, {"tick_max_s": 0.0}, {"unwell_max": 0}, {"orders_max": -1}, {"ended_max": 0}]
)
def test_limits_that_make_no_sense_are_a_programmers_error(limits: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        AgentLimits(**limits)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- story


def test_the_story_tells_what_changed_something() -> None:
    bench = Bench(1)
    bench.reach("a", State.READY)
    bench.tell(EngineHealthy("a"), EngineHealthy("a"), AgentTicked(), EngineExited("a", -11))
    assert [what for _, what in bench.core.story("a")] == [
        ReplicaOrdered(spec("a"), waits=False),
        TellState("a", "starting"),
        StartEngine(spec("a"), (0,)),
        EngineStarted("a", 7),
        TellState("a", "loading"),
        EngineHealthy("a"),
        TellState("a", "ready"),
        EngineExited("a", -11),
        TellState("a", "failed", "ended by signal 11"),
    ]


def test_the_story_is_bounded() -> None:
    bench = Bench(1)
    bench.reach("a", State.READY)
    for _ in range(STORY_MAX):
        bench.tell(EngineUnhealthy("a", "x"), EngineHealthy("a"))
    assert len(bench.core.story("a")) == STORY_MAX


def test_a_leak_is_seen() -> None:
    bench = Bench(2)
    bench.core.slots.take("ghost", 1)
    with pytest.raises(AssertionError, match="a slot leaks"):
        bench.core.validate()


def test_whoever_waits_in_vain_is_seen() -> None:
    bench = Bench(1)
    bench.reach("a", State.READY)
    bench.order("b", waits=True)
    a = bench.core.replicas["a"]
    a.state, a.slots, a.pid, a.reason = State.FAILED, (), None, "lost"
    bench.core.slots.release("a")
    bench.core.ended.append("a")
    with pytest.raises(AssertionError, match="b waits in vain"):
        bench.core.validate()


def test_states_with_a_process_are_those_of_the_tests() -> None:
    assert {*HAS_PROCESS} == {*STARTED_ONCE, State.STOPPING}
