"""A core with small limits, and shorthands for the events that lead a replica to where a test begins."""

from __future__ import annotations

from sllm_vllm.node.core.agent import AgentCore, AgentLimits
from sllm_vllm.node.core.events import (
    Action,
    AgentTicked,
    EngineHealthy,
    EngineStarted,
    EngineUnhealthy,
    Event,
    ReplicaOrdered,
    ReplicaSpec,
    StopAsked,
    TellState,
)
from sllm_vllm.node.core.replica import ReplicaRow, State

LIMITS = AgentLimits(start_s=60, stop_s=10, unwell_max=3, orders_max=3, ended_max=3, tick_max_s=2)


def spec(name: str, num_slots: int = 1) -> ReplicaSpec:
    return ReplicaSpec(name, f"model-{name}", num_slots=num_slots)


class Bench:
    """Every event is valid after, and a tenth of a second later than the one before."""

    def __init__(self, num_slots: int = 2, limits: AgentLimits = LIMITS) -> None:
        self.core = AgentCore(num_slots, limits)
        self.now_s = 100.0

    def tell(self, *events: Event) -> list[Action]:
        """The actions of the last one."""
        actions: list[Action] = []
        for event in events:
            self.now_s += 0.1
            actions = self.core.handle(event, self.now_s)
            self.core.validate()
        return actions

    def order(self, name: str, num_slots: int = 1, *, waits: bool = False) -> list[Action]:
        return self.tell(ReplicaOrdered(spec(name, num_slots), waits))

    def tick(self, seconds: float) -> list[Action]:
        """Time goes on at its normal pace; all actions."""
        actions: list[Action] = []
        for _ in range(round(seconds)):
            self.now_s += 0.9
            actions += self.tell(AgentTicked())
        return actions

    def jump(self, seconds: float) -> list[Action]:
        self.now_s += seconds
        return self.tell(AgentTicked())

    def reach(self, name: str, state: State) -> None:
        """Order it, and lead it on."""
        self.order(name)
        told: dict[State, list[Event]] = {
            State.STARTING: [],
            State.LOADING: [EngineStarted(name, 7)],
            State.READY: [EngineStarted(name, 7), EngineHealthy(name)],
            State.UNWELL: [EngineStarted(name, 7), EngineHealthy(name), EngineUnhealthy(name, "no answer")],
            State.STOPPING: [EngineStarted(name, 7), StopAsked(name)],
        }
        self.tell(*told[state])
        assert self.row(name).state is state

    def row(self, name: str) -> ReplicaRow:
        row = self.core.row(name)
        assert row is not None
        return row

    def states(self) -> dict[str, State]:
        return {row.id: row.state for row in self.core.snapshot()}


def told(actions: list[Action]) -> list[tuple[str, str]]:
    """What was told of states, without the reasons."""
    return [(action.replica, action.state) for action in actions if isinstance(action, TellState)]
