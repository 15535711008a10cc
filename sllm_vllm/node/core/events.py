"""What happens to a node's replicas, and what is to be done about it. Pure: events in, actions out of ``agent.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What is to run: ``vllm serve`` with these arguments, on ``num_slots`` slots. ``id`` is unique, unless the order
    reuses that of a replica that has ended."""

    id: str
    model: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    num_slots: int = 1
    start_s: float | None = None
    """Longest from its process to its health; None: the agent's."""


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class ReplicaOrdered:
    """Somebody wants a replica. ``waits``: rather later than never, if no slot is free. ``reuses_id``: its id may be
    that of one that has ended."""

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
    """There is no process, and there will be none."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineHealthy:
    """It answered that it is well."""

    replica: str


@dataclass(frozen=True, slots=True)
class EngineUnhealthy:
    """It did not answer, or said that it is not well."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineExited:
    """Its process ended: an exit status, or minus the signal that ended it."""

    replica: str
    status: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Nobody wants it any more."""

    replica: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: limits of starting, stopping and answering may be over."""


Event = (
    ReplicaOrdered
    | EngineStarted
    | EngineNotStarted
    | EngineHealthy
    | EngineUnhealthy
    | EngineExited
    | StopAsked
    | Ticked
)

# ----------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Start it on these slots."""

    spec: ReplicaSpec
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TerminateEngine:
    """Ask its process to end (SIGTERM). If there is none yet, call its start off: as ever, ``EngineStarted`` or
    ``EngineNotStarted`` follows."""

    replica: str


@dataclass(frozen=True, slots=True)
class KillEngine:
    """End its whole process group (SIGKILL). If there is none yet, call its start off. May be told more than once, and
    of a replica that is not known."""

    replica: str


@dataclass(frozen=True, slots=True)
class RefuseOrder:
    """It can't be started: tell whoever gave the very order that this is returned for."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class TellState:
    """It is in another state now: tell whoever waits for it, and the log."""

    replica: str
    state: str
    reason: str = ""


Action = StartEngine | TerminateEngine | KillEngine | RefuseOrder | TellState
