"""Events of a node's replicas and the actions that answer them. Pure: ``agent.py`` takes events and returns actions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What to run: ``vllm serve`` with these arguments, on ``num_slots`` slots. ``id`` is unique, unless the order
    reuses the id of a replica that has ended."""

    id: str
    model: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    num_slots: int = 1
    start_s: float | None = None
    """Longest time from its process's start until it is healthy; None: the agent's limit."""


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class ReplicaOrdered:
    """A replica is ordered. ``waits``: wait if no slot is free, instead of being refused. ``reuses_id``: its id may be
    that of a replica that has ended."""

    spec: ReplicaSpec
    waits: bool
    reuses_id: bool = False


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """Its process runs."""

    replica: str
    pid: int


@dataclass(frozen=True, slots=True)
class EngineNotStarted:
    """Its process could not be started; none will follow."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineHealthy:
    """It answered a health check with success."""

    replica: str


@dataclass(frozen=True, slots=True)
class EngineUnhealthy:
    """It did not answer a health check, or answered with an error."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineExited:
    """Its process ended. ``status``: its exit status, or minus the signal that ended it."""

    replica: str
    status: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """A stop was requested."""

    replica: str


@dataclass(frozen=True, slots=True)
class AgentTicked:
    """Time passed: the limits of starting and stopping must be checked."""


Event = (
    ReplicaOrdered
    | EngineStarted
    | EngineNotStarted
    | EngineHealthy
    | EngineUnhealthy
    | EngineExited
    | StopAsked
    | AgentTicked
)

# ----------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Start an engine on these slots."""

    spec: ReplicaSpec
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TerminateEngine:
    """Ask its process to end (SIGTERM). If there is no process yet, call off its start; ``EngineStarted`` or
    ``EngineNotStarted`` must follow all the same."""

    replica: str


@dataclass(frozen=True, slots=True)
class KillEngine:
    """End its whole process group (SIGKILL). If there is no process yet, call off its start. May be returned more than
    once, and for an unknown replica."""

    replica: str


@dataclass(frozen=True, slots=True)
class RefuseOrder:
    """The order can't be accepted: report the reason to the client that gave it."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class TellState:
    """It entered this state: notify waiting clients and log it."""

    replica: str
    state: str
    reason: str = ""


Action = StartEngine | TerminateEngine | KillEngine | RefuseOrder | TellState
