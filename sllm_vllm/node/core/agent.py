"""All replicas of a node: takes events, returns actions. Pure; the life cycle of a replica is the table in
``replica.py``.

Owned by the agent's run loop. The caller must answer each ``StartEngine`` with either one ``EngineNotStarted``, or one
``EngineStarted`` and later one ``EngineExited``, in this order for each process. It must also send an ``AgentTicked``
about every second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import assert_never

from sllm_vllm.node.core.events import (
    Action,
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
from sllm_vllm.node.core.invariants import validate
from sllm_vllm.node.core.replica import (
    ENDED,
    LIFE,
    STARTED_ONCE,
    WELL_ONCE,
    Do,
    Kind,
    NodeReplica,
    ReplicaRow,
    State,
    row_of,
)
from sllm_vllm.node.core.slots import AcceleratorSlots


@dataclass(frozen=True, slots=True)
class AgentLimits:
    """Time limits and maximum counts.

    ``start_s``: from the order to start until the process runs, and again from there until it is healthy, unless the
    order gives its own. ``stop_s``: from SIGTERM to SIGKILL, and between one SIGKILL and the next. ``unwell_max``:
    consecutive missed health answers after which a replica counts as hung. ``orders_max``: orders that may wait.
    ``ended_max``: ended replicas that are remembered. ``tick_max_s``: the most that one step of the clock counts
    against a limit.
    """

    start_s: float = 600.0
    stop_s: float = 20.0
    unwell_max: int = 3
    orders_max: int = 64
    ended_max: int = 64
    tick_max_s: float = 5.0

    def __post_init__(self) -> None:
        assert 0 < self.tick_max_s < min(self.start_s, self.stop_s), "else one jump of the clock ends a replica"
        assert self.unwell_max >= 1
        assert self.orders_max >= 0
        assert self.ended_max >= 1


class AgentCore:
    """The replicas and slots of one node.

    Limits are measured on a *paced* clock: it advances from one event to the next as the given clock does, but by at
    most ``tick_max_s``, and never backwards. So after a machine slept, or the agent was blocked, for an hour, at
    most ``tick_max_s`` of every limit has been used up. Limits are checked when an ``AgentTicked`` arrives.

    Waiting orders are served strictly in order: none overtakes another, and while any order waits, an order that does
    not wait is refused. Slots that a large order needs stay empty until it has all of them: how long engines
    run can't be predicted, and a large model that is overtaken again and again would never start.
    """

    def __init__(self, num_slots: int, limits: AgentLimits) -> None:
        self.limits = limits
        self.slots = AcceleratorSlots(num_slots)
        self.replicas: dict[str, NodeReplica] = {}
        """All that are alive and those that ended last, in the order in which they were ordered."""
        self.waiting: deque[str] = deque()
        self.ended: deque[str] = deque()
        """Ids of ended replicas; the most recent is last."""
        self.paced_s = 0.0
        """The paced clock."""
        self._now_s: float | None = None
        self._actions: list[Action] = []

    # --------------------------------------------------------------------------------------------------- interface

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Record an event and return the actions to take, in this order.

        A ``RefuseOrder`` answers the order passed in this call: an existing replica with the same id is not affected.
        """
        self._pace(now_s)
        actions = self._actions = list[Action]()
        self._record(event, now_s)
        self._serve_waiting(now_s)
        self._forget_ended()
        return actions

    def snapshot(self) -> tuple[ReplicaRow, ...]:
        """All known replicas, in the order in which they were ordered."""
        return tuple(row_of(replica) for replica in self.replicas.values())

    def row(self, replica_id: str) -> ReplicaRow | None:
        """One replica; None if it was never known or has been forgotten."""
        replica = self.replicas.get(replica_id)
        return None if replica is None else row_of(replica)

    def story(self, replica_id: str) -> list[tuple[float, Event | Action]]:
        """The last events and actions of a replica, oldest first; those that changed nothing are left out."""
        replica = self.replicas.get(replica_id)
        return [] if replica is None else list(replica.story)

    def validate(self) -> None:
        """Assert every invariant. Checks everything, so only for tests and the simulator."""
        validate(self)

    # ------------------------------------------------------------------------------------------------------ events

    def _pace(self, now_s: float) -> None:
        passed_s = 0.0 if self._now_s is None else now_s - self._now_s
        self.paced_s += min(max(0.0, passed_s), self.limits.tick_max_s)
        self._now_s = now_s

    def _record(self, event: Event, now_s: float) -> None:
        match event:
            case ReplicaOrdered():
                self._replica_ordered(event, now_s)
            case EngineStarted():
                self._engine_started(event, now_s)
            case EngineNotStarted():
                self._engine_gone(event, now_s, reason=event.reason or "it did not start")
            case EngineExited():
                self._engine_gone(event, now_s)
            case EngineHealthy():
                self._happened(event, now_s, Kind.HEALTHY)
            case EngineUnhealthy():
                self._engine_unhealthy(event, now_s)
            case StopAsked():
                self._happened(event, now_s, Kind.STOP_ASKED, reason="stop asked")
            case AgentTicked():
                self._end_overdue(now_s)
            case _:
                assert_never(event)

    def _replica_ordered(self, event: ReplicaOrdered, now_s: float) -> None:
        spec = event.spec
        known = self.replicas.get(spec.id)
        if known is not None and known.spec == spec and known.state not in {State.STOPPING, *ENDED}:
            return
        reason = self._why_not(event)
        if reason:
            self._actions.append(RefuseOrder(spec.id, reason))
            return
        if known is not None:  # an ended replica, whose id the new one takes over
            del self.replicas[spec.id]
            self.ended.remove(spec.id)
        replica = NodeReplica(spec, since_s=now_s, paced_s=self.paced_s)
        replica.story.append((now_s, event))
        self.replicas[spec.id] = replica
        if not self._fits(spec):
            replica.reason = f"{self._lack(spec)}; {len(self.waiting)} orders are before it"
            self._tell(replica, now_s)
        self.waiting.append(spec.id)

    def _why_not(self, order: ReplicaOrdered) -> str:
        """Why an order must be refused; empty if it can be accepted."""
        spec, limits = order.spec, self.limits
        known = self.replicas.get(spec.id)
        if known is not None and not (order.reuses_id and known.state in ENDED):
            what = f"is {known.state.value}" if known.spec == spec else "was ordered with another spec"
            return f"{spec.id} {what}: order under a new id"
        if not 1 <= spec.num_slots <= self.slots.num_slots:
            return f"it wants {spec.num_slots} slots, this node has {self.slots.num_slots}"
        if self._fits(spec):
            return ""
        if not order.waits:
            return f"{self._lack(spec)}; {len(self.waiting)} orders wait"
        if len(self.waiting) >= limits.orders_max:
            return f"{len(self.waiting)} orders wait already, no more than {limits.orders_max} may"
        return ""

    def _engine_started(self, event: EngineStarted, now_s: float) -> None:
        replica = self.replicas.get(event.replica)
        if replica is None or not replica.slots:
            # The replica is gone or has no slots any more; others may own its slots.
            self._actions.append(KillEngine(event.replica))
            return
        assert replica.pid is None, f"{event.replica} runs as process {replica.pid}, and now as {event.pid}"
        replica.pid = event.pid
        self._happened(event, now_s, Kind.STARTED)

    def _engine_gone(self, event: EngineNotStarted | EngineExited, now_s: float, *, reason: str = "") -> None:
        replica = self.replicas.get(event.replica)
        if replica is None or not replica.slots:
            return
        if isinstance(event, EngineExited):
            replica.status = event.status
            reason = _ending(event.status, was_well=replica.state in WELL_ONCE)
        kind = Kind.GONE_AT_FAULT if replica.is_faulty else Kind.GONE
        self._happened(event, now_s, kind, reason=reason)

    def _engine_unhealthy(self, event: EngineUnhealthy, now_s: float) -> None:
        replica = self.replicas.get(event.replica)
        if replica is None or replica.state not in WELL_ONCE:
            return
        replica.misses += 1
        if replica.misses < self.limits.unwell_max:
            self._happened(event, now_s, Kind.UNHEALTHY, reason=event.reason or "no healthy answer")
            return
        reason = f"hung: {replica.misses} health answers missed in a row, the last one: {event.reason}"
        self._happened(event, now_s, Kind.HUNG, reason=reason)

    def _end_overdue(self, now_s: float) -> None:
        limits = self.limits
        for replica in self.replicas.values():
            waited_s = self.paced_s - replica.paced_s
            if replica.state is State.STOPPING:
                if waited_s >= limits.stop_s:
                    self._step(replica, Kind.STOP_OVERDUE, now_s)
            elif waited_s >= (start_s := replica.spec.start_s or limits.start_s):
                what = "not healthy" if replica.state in STARTED_ONCE else "no process"
                self._step(replica, Kind.START_OVERDUE, now_s, reason=f"{what} within {start_s:.0f} s")

    # --------------------------------------------------------------------------------------------------- one step

    def _happened(
        self,
        event: EngineStarted | EngineNotStarted | EngineExited | EngineHealthy | EngineUnhealthy | StopAsked,
        now_s: float,
        kind: Kind,
        *,
        reason: str = "",
    ) -> None:
        """Apply an event to its replica, if the replica is known and the table has an entry for it."""
        replica = self.replicas.get(event.replica)
        if replica is not None and (replica.state, kind) in LIFE:
            replica.story.append((now_s, event))
            self._step(replica, kind, now_s, reason=reason)

    def _step(self, replica: NodeReplica, kind: Kind, now_s: float, *, reason: str = "") -> None:
        """Apply one entry of the table. A replica that is stopping keeps its first reason."""
        transition = LIFE.get((replica.state, kind))
        if transition is None:
            return
        old, replica.state = replica.state, transition.to
        replica.paced_s = self.paced_s
        if old is not State.STOPPING:
            replica.reason = reason
        if transition.to is not old:
            self._enter(replica, now_s)
        if old is not State.STOPPING and transition.to is State.STOPPING:
            replica.is_faulty = kind is not Kind.STOP_ASKED
        self._do(replica, transition.do, now_s)

    def _enter(self, replica: NodeReplica, now_s: float) -> None:
        """Update the record after a change of state."""
        name, state = replica.spec.id, replica.state
        replica.since_s = now_s
        if state is not State.UNWELL:
            replica.misses = 0
        if state in ENDED:
            self.slots.release(name)
            replica.slots = ()
            replica.pid = None
            self.ended.append(name)
            if name in self.waiting:
                self.waiting.remove(name)
        self._tell(replica, now_s)

    def _do(self, replica: NodeReplica, do: Do, now_s: float) -> None:
        match do:
            case Do.NOTHING:
                pass
            case Do.START:
                replica.slots = self.slots.take(replica.spec.id, replica.spec.num_slots)
                self._act(replica, StartEngine(replica.spec, replica.slots), now_s)
            case Do.TERMINATE:
                self._act(replica, TerminateEngine(replica.spec.id), now_s)
            case Do.KILL:
                self._act(replica, KillEngine(replica.spec.id), now_s)
            case _:
                assert_never(do)

    def _tell(self, replica: NodeReplica, now_s: float) -> None:
        self._act(replica, TellState(replica.spec.id, replica.state.value, replica.reason), now_s)

    def _act(self, replica: NodeReplica, action: Action, now_s: float) -> None:
        replica.story.append((now_s, action))
        self._actions.append(action)

    # ------------------------------------------------------------------------------------------------------- slots

    def _fits(self, spec: ReplicaSpec) -> bool:
        """Whether an order that arrives now could start at once."""
        return not self.waiting and spec.num_slots <= self.slots.num_free

    def _lack(self, spec: ReplicaSpec) -> str:
        return f"{spec.num_slots} of {self.slots.num_slots} slots wanted, {self.slots.num_free} free"

    def _serve_waiting(self, now_s: float) -> None:
        while self.waiting:
            replica = self.replicas[self.waiting[0]]
            if replica.spec.num_slots > self.slots.num_free:
                return
            self.waiting.popleft()
            self._step(replica, Kind.SLOTS_GIVEN, now_s)

    def _forget_ended(self) -> None:
        while len(self.ended) > self.limits.ended_max:
            del self.replicas[self.ended.popleft()]


def _ending(status: int, *, was_well: bool) -> str:
    how = f"ended by signal {-status}" if status < 0 else f"exited with status {status}"
    return how if was_well else f"{how} before it was healthy"
