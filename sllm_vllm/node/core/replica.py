"""The life of a replica as a table, and the record of one. Pure; owned by ``AgentCore``.

``LIFE`` is the whole of it: what is not in the table changes nothing. The diagram in DESIGN.md is drawn from it, by
``diagram``; a test fails if the two differ.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from sllm_vllm.node.core.events import Action, Event, ReplicaSpec

STORY_MAX = 64
"""Events and actions remembered about one replica."""


class State(Enum):
    """Where a replica is in its life."""

    WAITING = "waiting"
    """For slots, behind those that were ordered before it."""
    STARTING = "starting"
    """It has slots and its start is ordered; there is no process yet."""
    LOADING = "loading"
    """Its process runs, and was never healthy."""
    READY = "ready"
    UNWELL = "unwell"
    """It missed its last health answers. It may recover."""
    STOPPING = "stopping"
    """It must end. Its process may still be there, or still come, so it keeps its slots."""
    STOPPED = "stopped"
    """It ended as it was asked to."""
    FAILED = "failed"
    """It ended by itself, or was killed because it was late or hung."""


class Kind(Enum):
    """What can happen to a replica; the core makes it of an event, the limits and what went before."""

    SLOTS_GIVEN = "slots given"
    STARTED = "process runs"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    HUNG = "unhealthy too often"
    START_OVERDUE = "not healthy in time"
    STOP_ASKED = "stop asked"
    STOP_OVERDUE = "not gone in time"
    GONE = "process gone"
    """Its process ended, or there never was one."""
    GONE_AT_FAULT = "process gone, killed for a fault"


class Do(Enum):
    """What is to be done to its process."""

    NOTHING = ""
    START = "start"
    TERMINATE = "SIGTERM"
    KILL = "SIGKILL"


class Transition(NamedTuple):
    """What becomes of it."""

    to: State
    do: Do = Do.NOTHING


LIFE: dict[tuple[State, Kind], Transition] = {
    (State.WAITING, Kind.SLOTS_GIVEN): Transition(State.STARTING, Do.START),
    (State.WAITING, Kind.STOP_ASKED): Transition(State.STOPPED),
    #
    (State.STARTING, Kind.STARTED): Transition(State.LOADING),
    (State.STARTING, Kind.START_OVERDUE): Transition(State.STOPPING, Do.KILL),
    (State.STARTING, Kind.STOP_ASKED): Transition(State.STOPPING, Do.TERMINATE),
    (State.STARTING, Kind.GONE): Transition(State.FAILED),
    #
    (State.LOADING, Kind.HEALTHY): Transition(State.READY),
    (State.LOADING, Kind.START_OVERDUE): Transition(State.STOPPING, Do.KILL),
    (State.LOADING, Kind.STOP_ASKED): Transition(State.STOPPING, Do.TERMINATE),
    (State.LOADING, Kind.GONE): Transition(State.FAILED),
    #
    (State.READY, Kind.UNHEALTHY): Transition(State.UNWELL),
    (State.READY, Kind.HUNG): Transition(State.STOPPING, Do.KILL),
    (State.READY, Kind.STOP_ASKED): Transition(State.STOPPING, Do.TERMINATE),
    (State.READY, Kind.GONE): Transition(State.FAILED),
    #
    (State.UNWELL, Kind.HEALTHY): Transition(State.READY),
    (State.UNWELL, Kind.UNHEALTHY): Transition(State.UNWELL),
    (State.UNWELL, Kind.HUNG): Transition(State.STOPPING, Do.KILL),
    (State.UNWELL, Kind.STOP_ASKED): Transition(State.STOPPING, Do.TERMINATE),
    (State.UNWELL, Kind.GONE): Transition(State.FAILED),
    #
    (State.STOPPING, Kind.STARTED): Transition(State.STOPPING, Do.TERMINATE),  # it came although it was called off
    (State.STOPPING, Kind.STOP_OVERDUE): Transition(State.STOPPING, Do.KILL),  # again and again, until it is gone
    (State.STOPPING, Kind.GONE): Transition(State.STOPPED),
    (State.STOPPING, Kind.GONE_AT_FAULT): Transition(State.FAILED),
}

ENDED = frozenset({State.STOPPED, State.FAILED})
HOLDING = frozenset(State) - ENDED - {State.WAITING}
"""States in which it owns slots: from the order to start until its process is known to be gone."""
STARTED_ONCE = frozenset({State.LOADING, State.READY, State.UNWELL})
"""States in which it has a process; in STOPPING it may have one."""
WELL_ONCE = frozenset({State.READY, State.UNWELL})
"""States in which its health is counted."""


@dataclass(slots=True)
class Replica:
    """One replica that was ordered. ``slots`` are those it owns now, ``pid`` is its process's while that may run."""

    spec: ReplicaSpec
    since_s: float
    """When it came into this state, by the clock of the events."""
    state: State = State.WAITING
    slots: tuple[int, ...] = ()
    pid: int | None = None
    reason: str = ""
    """Why it is WAITING, UNWELL, STOPPING or has ended; else empty."""
    status: int | None = None
    """How its process ended: an exit status, or minus a signal."""
    is_faulty: bool = False
    """It is killed for its own fault, so it will have FAILED."""
    misses: int = 0
    """Health answers missed in a row."""
    paced_s: float = 0.0
    """When its last transition was, by the paced clock of ``AgentCore``."""
    story: deque[tuple[float, Event | Action]] = field(default_factory=lambda: deque(maxlen=STORY_MAX))


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """A replica as people and the router see it."""

    id: str
    model: str
    state: State
    slots: tuple[int, ...]
    pid: int | None
    since_s: float
    reason: str
    status: int | None


def row_of(replica: Replica) -> ReplicaRow:
    """It, frozen."""
    return ReplicaRow(
        id=replica.spec.id,
        model=replica.spec.model,
        state=replica.state,
        slots=replica.slots,
        pid=replica.pid,
        since_s=replica.since_s,
        reason=replica.reason,
        status=replica.status,
    )


def diagram() -> str:
    """The table as a mermaid state diagram: an arrow for each pair of states, with what happens and what is done."""
    labels: dict[tuple[State, State], list[str]] = {}
    for (state, kind), (to, do) in LIFE.items():
        done = f" / {do.value}" if do.value else ""
        labels.setdefault((state, to), []).append(kind.value + done)
    arrows = [f"    {state.name} --> {to.name}: {' or '.join(kinds)}" for (state, to), kinds in labels.items()]
    ends = [f"    {state.name} --> [*]" for state in State if state in ENDED]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.WAITING.name}: ordered", *arrows, *ends])
