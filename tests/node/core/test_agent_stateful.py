"""Random lives of a node: orders, engines that die or hang in any phase, health, stops, ticks, clock jumps."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sllm_vllm.node.core.agent import AgentCore, AgentLimits
from sllm_vllm.node.core.events import (
    AgentTicked,
    EngineExited,
    EngineHealthy,
    EngineNotStarted,
    EngineStarted,
    EngineUnhealthy,
    Event,
    KillEngine,
    RefuseOrder,
    ReplicaOrdered,
    ReplicaSpec,
    StartEngine,
    StopAsked,
    TellState,
    TerminateEngine,
)
from sllm_vllm.node.core.replica import ENDED, LIFE, State

NUM_EXAMPLES = 150
STEPS_MAX = 80
EVENTS_MIN = 5_000
END_ROUNDS_MAX = 5
"""Steps of ``tick_max_s`` until whoever must end was killed: ``stop_s`` is two of them."""

choice = st.integers(0, 1 << 16)
LEADS_TO = {(state.value, to.to.value) for (state, _), to in LIFE.items()}


class Shell(RuleBasedStateMachine):
    """A fake shell. It knows which process runs on which slots, so it sees double use; and what it was told."""

    num_events = 0

    @initialize(num_slots=st.integers(1, 5), unwell_max=st.integers(1, 3), orders_max=st.integers(0, 6))
    def start(self, num_slots: int, unwell_max: int, orders_max: int) -> None:
        self.limits = AgentLimits(
            start_s=20, stop_s=6, unwell_max=unwell_max, orders_max=orders_max, ended_max=5, tick_max_s=3
        )
        self.core = AgentCore(num_slots, self.limits)
        self.num_slots = num_slots
        self.now_s = 0.0
        self.num_ordered = 0
        self.starting: dict[str, tuple[int, ...]] = {}
        self.running: dict[str, tuple[int, ...]] = {}
        self.killed: set[str] = set()
        self.states: dict[str, str] = {}

    def tell(self, event: Event) -> None:
        Shell.num_events += 1
        for action in self.core.handle(event, self.now_s):
            match action:
                case StartEngine(spec, slots):
                    used = [slot for held in (*self.starting.values(), *self.running.values()) for slot in held]
                    assert not set(slots) & set(used), "double use"
                    assert len(slots) == spec.num_slots
                    self.starting[spec.id] = slots
                case TerminateEngine(name):
                    assert name in self.starting or name in self.running
                case KillEngine(name):
                    assert name in self.starting or name in self.running
                    self.killed.add(name)
                case TellState(name, state, _):
                    old = self.states.get(name, "waiting")
                    assert state == old == "waiting" or (old, state) in LEADS_TO, f"{name}: {old} to {state}"
                    self.states[name] = state
                case RefuseOrder(name, reason):
                    assert isinstance(event, ReplicaOrdered)
                    assert event.spec.id == name
                    assert reason

    def one_of(self, names: dict[str, Any], number: int) -> str:
        return list(names)[number % len(names)]

    @rule(num_slots=st.integers(0, 6), waits=st.booleans())
    def order(self, num_slots: int, waits: bool) -> None:
        self.num_ordered += 1
        self.tell(ReplicaOrdered(ReplicaSpec(f"r{self.num_ordered}", "model", num_slots=num_slots), waits))

    @precondition(lambda self: self.core.replicas)
    @rule(number=choice, is_same=st.booleans())
    def order_again(self, number: int, is_same: bool) -> None:
        spec = self.core.replicas[self.one_of(self.core.replicas, number)].spec
        before = self.core.snapshot()
        self.tell(ReplicaOrdered(spec if is_same else ReplicaSpec(spec.id, "other"), waits=True))
        assert self.core.snapshot() == before

    @precondition(lambda self: self.starting)
    @rule(number=choice, comes=st.booleans())
    def end_start(self, number: int, comes: bool) -> None:
        name = self.one_of(self.starting, number)
        slots = self.starting.pop(name)
        if comes:
            self.running[name] = slots
            self.tell(EngineStarted(name, self.num_ordered + 1000))
        else:
            self.tell(EngineNotStarted(name, "no"))

    @precondition(lambda self: self.running)
    @rule(number=choice, status=st.sampled_from([0, 1, 2, -9, -15]))
    def exit(self, number: int, status: int) -> None:
        name = self.one_of(self.running, number)
        was_asked = self.states[name] == "stopping"
        self.running.pop(name)
        self.tell(EngineExited(name, status))
        assert self.states[name] in {"stopped", "failed"} if was_asked else self.states[name] == "failed"

    @precondition(lambda self: self.running)
    @rule(number=choice, answers=st.lists(st.booleans(), min_size=1, max_size=4))
    def probe(self, number: int, answers: list[bool]) -> None:
        name = self.one_of(self.running, number)
        for is_well in answers:
            self.tell(EngineHealthy(name) if is_well else EngineUnhealthy(name, "no answer"))

    @precondition(lambda self: self.core.replicas)
    @rule(number=choice)
    def stop(self, number: int) -> None:
        name = self.one_of(self.core.replicas, number)
        self.tell(StopAsked(name))
        assert self.states[name] in {"stopping", "stopped", "failed"}

    @rule(num_ticks=st.integers(1, 25))
    def tick(self, num_ticks: int) -> None:
        for _ in range(num_ticks):
            self.now_s += 1
            self.tell(AgentTicked())

    @rule(seconds=st.sampled_from([10.0, 1e5, -1e5]))
    def jump(self, seconds: float) -> None:
        """A replica that came into its state just now is not ended by it, however far it goes."""
        fresh = {name for name, replica in self.core.replicas.items() if replica.paced_s == self.core.paced_s}
        killed = set(self.killed)
        self.now_s += seconds
        self.tell(AgentTicked())
        assert not fresh & (self.killed - killed)

    @rule(event=st.sampled_from([StopAsked("x"), EngineHealthy("x"), EngineUnhealthy("x", ""), EngineExited("x", 0)]))
    def hear_of_an_unknown_one(self, event: Event) -> None:
        assert self.core.handle(event, self.now_s) == []

    @rule()
    def everything_ends(self) -> None:
        """Nothing leaks: once all are asked to stop and all processes are gone, every slot is free."""
        for name in list(self.core.replicas):
            self.tell(StopAsked(name))
        assert not self.core.waiting
        for _ in range(END_ROUNDS_MAX):
            for name in list(self.starting):
                self.end_start(list(self.starting).index(name), comes=True)
            self.now_s += self.limits.tick_max_s
            self.tell(AgentTicked())
            for name in list(self.running):
                if name in self.killed:
                    self.running.pop(name)
                    self.tell(EngineExited(name, -9))
        assert not self.running, "an engine that does not end is never killed"
        assert self.core.slots.num_free == self.num_slots
        assert {row.state for row in self.core.snapshot()} <= ENDED

    @invariant()
    def is_valid(self) -> None:
        self.core.validate()

    @invariant()
    def slots_are_where_processes_are_or_may_come(self) -> None:
        assert self.core.slots.owners() == {**self.starting, **self.running}

    @invariant()
    def all_was_told(self) -> None:
        assert {row.id: row.state for row in self.core.snapshot()} == {
            row.id: State(self.states[row.id]) for row in self.core.snapshot()
        }

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.everything_ends()
            self.core.validate()


def test_nothing_leaks_and_every_invariant_holds() -> None:
    Shell.num_events = 0
    budget: dict[str, Any] = {"max_examples": NUM_EXAMPLES, "stateful_step_count": STEPS_MAX}
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Shell, settings=settings(**budget, deadline=None, derandomize=True, suppress_health_check=slow)
    )
    print(f"{Shell.num_events} events")
    assert Shell.num_events >= EVENTS_MIN
