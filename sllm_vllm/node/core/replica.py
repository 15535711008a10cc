"""The life cycle of a replica as a table, and the record of a replica. Pure; owned by ``AgentCore``.

``LIFE`` is complete: an event without an entry changes nothing. ``diagram`` draws the diagram in DESIGN.md from it; a
test fails if the two differ.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from sllm_vllm.node.core.events import Action, Event, ReplicaSpec

STORY_MAX = 64
"""Events and actions remembered for each replica."""


class State(Enum):
    """Where a replica is in its life cycle."""

    WAITING = "waiting"
    """Waits for slots, behind earlier orders."""
    STARTING = "starting"
    """Has slots, and its start is ordered; no process yet."""
    LOADING = "loading"
    """Its process runs and has not been healthy yet."""
    READY = "ready"
    UNWELL = "unwell"
    """Missed its last health answers; may recover."""
    STOPPING = "stopping"
    """Must end. Its process may still run, or still appear, so it keeps its slots."""
    STOPPED = "stopped"
    """Ended as requested."""
    FAILED = "failed"
    """Ended without being asked, or was killed because it was late or hung."""


class Kind(Enum):
    """What can happen to a replica. The core derives it from an event, the limits and the replica's record."""

    SLOTS_GIVEN = "slots given"
    STARTED = "process runs"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    HUNG = "unhealthy too often"
    START_OVERDUE = "not healthy in time"
    STOP_ASKED = "stop asked"
    STOP_OVERDUE = "not gone in time"
    GONE = "process gone"
    """Its process ended, or could not be started."""
    GONE_AT_FAULT = "process gone, killed for a fault"


class Do(Enum):
    """The action on its process."""

    NOTHING = ""
    START = "start"
    TERMINATE = "SIGTERM"
    KILL = "SIGKILL"


class Transition(NamedTuple):
    """The state that follows and the action on the process."""

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
    (State.STOPPING, Kind.STARTED): Transition(State.STOPPING, Do.TERMINATE),  # although its start was called off
    (State.STOPPING, Kind.STOP_OVERDUE): Transition(State.STOPPING, Do.KILL),  # repeated until it is gone
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
class NodeReplica:
    """One replica that was ordered. ``slots`` are those it owns now; ``pid`` is its process while that may run."""

    spec: ReplicaSpec
    since_s: float
    """When it entered its state, on the events' clock."""
    state: State = State.WAITING
    slots: tuple[int, ...] = ()
    pid: int | None = None
    reason: str = ""
    """Why it is WAITING, UNWELL, STOPPING or has ended; else empty."""
    status: int | None = None
    """How its process ended: an exit status, or minus a signal."""
    is_faulty: bool = False
    """It is being killed for a fault of its own, so it will end as FAILED."""
    misses: int = 0
    """Consecutive health answers missed."""
    paced_s: float = 0.0
    """When its last transition was, on the paced clock of ``AgentCore``."""
    story: deque[tuple[float, Event | Action]] = field(default_factory=lambda: deque(maxlen=STORY_MAX))


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """A replica as shown to users and to the router."""

    id: str
    model: str
    state: State
    slots: tuple[int, ...]
    pid: int | None
    since_s: float
    reason: str
    status: int | None


def row_of(replica: NodeReplica) -> ReplicaRow:
    """An immutable copy of the record's public part."""
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
    """Draw the table as a mermaid state diagram: an arrow for each pair of states, labelled with event and action."""
    labels: dict[tuple[State, State], list[str]] = {}
    for (state, kind), (to, do) in LIFE.items():
        done = f" / {do.value}" if do.value else ""
        labels.setdefault((state, to), []).append(kind.value + done)
    arrows = [f"    {state.name} --> {to.name}: {' or '.join(kinds)}" for (state, to), kinds in labels.items()]
    ends = [f"    {state.name} --> [*]" for state in State if state in ENDED]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.WAITING.name}: ordered", *arrows, *ends])
