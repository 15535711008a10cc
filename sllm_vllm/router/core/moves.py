"""Which request moves where, and when: off replicas that are ending, to others of their model. Pure.

Part of ``RouterCore``.

One rule covers an operator's drain, a changed model, and slots needed by another model: a request on a DRAINING replica
moves as soon as a READY one of the same lineage has room. While it moves it has a place on both replicas. So no room is
promised twice, and its target does not count as idle and cannot be evicted.
"""

from __future__ import annotations

from collections import Counter

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState, choose_replica
from sllm_vllm.router.core.events import (
    MoveAsked,
    MoveFailed,
    MoveRequest,
    ReplicaMovable,
    RequestMoved,
    StopReplica,
    Todo,
)
from sllm_vllm.router.core.facts import MoveLimits
from sllm_vllm.router.core.model_state import CoreState, Request
from sllm_vllm.router.core.scaling import Scaling

TARGETS_MAX = 8
"""Replicas examined as targets of one request, those with the fewest requests first."""


class Moves:
    """Orders and tracks migrations."""

    def __init__(self, limits: MoveLimits, scaling: Scaling, core_state: CoreState) -> None:
        self.limits = limits
        self.moving: dict[str, str] = {}
        """By request: the replica that it is moving to."""
        self._scaling = scaling
        self._cluster: Cluster = scaling.cluster
        self._models = core_state.models
        self._requests = core_state.requests
        self._on_trial = core_state.on_trial
        self._to: Counter[str] = Counter()
        """By replica: the number of requests that are moving to it."""

    def record(self, event: ReplicaMovable | MoveAsked | RequestMoved | MoveFailed, now_s: float) -> Todo:
        """Process an event; unknown requests and replicas are ignored."""
        todo = Todo(has_room=True)
        match event:
            case ReplicaMovable():
                if (replica := self._cluster.replicas.get(event.replica)) is not None:
                    replica.is_movable = event.is_movable  # not indexed by the cluster
                    replica.is_unmovable = not event.is_movable
            case MoveAsked():
                todo.do(self._ask(event.request, event.target, now_s))
            case RequestMoved():
                self._moved(event, now_s, todo)
            case MoveFailed():
                self._failed(event, now_s, todo)
        return todo

    # ---------------------------------------------------------------------------------------------------- ordering

    def relieve(self, now_s: float) -> list[MoveRequest]:
        """Order migrations off draining replicas, as far as possible."""
        orders: list[MoveRequest] = []
        if self.limits.is_on:
            for model in self._cluster.draining:
                for replica in self._cluster.replicas_of(model, ReplicaState.DRAINING):
                    orders += self._relieve(replica, now_s)
        return orders

    def _ask(self, request_id: str, target: str | None, now_s: float) -> MoveRequest | None:
        """Order a migration for an operator; returns None if it is not possible."""
        if self.why_not(request_id, target, now_s):
            return None
        request = self._requests[request_id]
        found = self._target_of(request) if target is None else self._cluster.replicas[target]
        assert found is not None
        return self._order(request, found, now_s)

    def why_not(self, request_id: str, target: str | None, now_s: float) -> str:
        """Return why ``MoveAsked`` would do nothing; empty if it would order a migration."""
        request = self._requests.get(request_id)
        if not self.limits.is_on:
            return "moving requests is switched off"
        if request is None or request.replica not in self._cluster.replicas:
            return "no replica has it"
        if problem := self._why_request_stays(request, now_s):
            return problem
        if len(self.moving) >= self.limits.moves_max:
            return f"{self.limits.moves_max} requests move already"
        if target is None:
            return "" if self._target_of(request) is not None else "no other replica of its model can take it now"
        found = self._cluster.replicas.get(target)
        return f"there is no replica {target}" if found is None else self._why_no_target(request, found)

    def _relieve(self, replica: Replica, now_s: float) -> list[MoveRequest]:
        orders: list[MoveRequest] = []
        for request_id in sorted(replica.ongoing):
            if len(self.moving) >= self.limits.moves_max:
                break
            request = self._requests[request_id]
            if request.replica != replica.id or self._why_request_stays(request, now_s):
                continue
            target = self._target_of(request)
            if target is not None:
                orders.append(self._order(request, target, now_s))
        return orders

    def _why_request_stays(self, request: Request, now_s: float) -> str:
        source = self._cluster.replicas.get(request.replica or "")
        if source is None or not source.is_movable:
            return "its engine hands over no requests"
        if request.target is not None:
            return f"it is moving to {request.target} already"
        if request.is_suspect:
            return "its last engine may have died of it"
        if request.stays:
            return "it can't be moved"
        return "its last move has only just failed" if now_s < request.move_after_s else ""

    def _target_of(self, request: Request) -> Replica | None:
        least = self._cluster.least_busy(request.facts.model, TARGETS_MAX)
        fit = [one for one in least if not self._why_no_target(request, one)]
        return choose_replica(fit, request.facts.prefix)

    def _why_no_target(self, request: Request, target: Replica) -> str:
        source = self._cluster.replicas[request.replica or ""]
        state = self._models.get(target.model)
        if target.id == source.id:
            return f"it is on {target.id} already"
        if target.model != source.model or target.lineage != source.lineage:
            return f"{target.id} would answer otherwise"
        if target.state is not ReplicaState.READY or not target.is_movable or state is None:
            return f"{target.id} takes over no requests"
        if target.id in self._on_trial:
            return f"{target.id} is tried with a request that may have killed an engine"
        if len(target.ongoing) >= state.spec.ongoing_max or self._to[target.id] >= self.limits.per_target_max:
            return f"{target.id} has no room"
        return ""

    def _order(self, request: Request, target: Replica, now_s: float) -> MoveRequest:
        assert request.replica is not None
        request.target = self.moving[request.facts.id] = target.id
        self._to[target.id] += 1
        self._cluster.begin_request(target.id, request.facts.id, prefix=request.facts.prefix, now_s=now_s)
        return MoveRequest(request.facts.id, request.replica, target.id)

    # ------------------------------------------------------------------------------------------------------- ending

    def _moved(self, event: RequestMoved, now_s: float, todo: Todo) -> None:
        """Record that a request now runs on its target, which may have ended since."""
        self._learn(event)
        request = self._requests.get(event.request)
        if request is None or request.target != event.target:
            return
        source = request.replica
        self._forget(request)
        request.replica = event.target
        todo.look_at((request.facts.model,))
        todo.do(self._leave(source, request, now_s))

    def _failed(self, event: MoveFailed, now_s: float, todo: Todo) -> None:
        """Record that a migration failed: the request continues where it was."""
        self._learn(event)
        request = self._requests.get(event.request)
        if request is None or request.target != event.target:
            return
        request.num_move_failures += 1
        request.stays = event.is_lasting or request.num_move_failures >= self.limits.failures_max
        request.move_after_s = now_s + self.limits.pause_s
        todo.look_at((request.facts.model,))
        todo.do(self.called_off(request, now_s))

    def called_off(self, request: Request, now_s: float) -> StopReplica | None:
        """Release the request's place on its target, if it has one, as the request or its migration ends."""
        target = request.target
        if target is None:
            return None
        self._forget(request)
        return self._leave(target, request, now_s)

    def target_gone(self, target: Replica, now_s: float) -> None:
        """Cancel the migrations to a replica that is gone. The mover of each will soon notice, too."""
        for request_id in target.ongoing:
            request = self._requests.get(request_id)
            if request is not None and request.target == target.id:
                request.move_after_s = now_s + self.limits.pause_s
                self._forget(request)

    def _forget(self, request: Request) -> None:
        assert request.target is not None
        self._to[request.target] -= 1
        if not self._to[request.target]:
            del self._to[request.target]
        del self.moving[request.facts.id]
        request.target = None

    def _leave(self, replica_id: str | None, request: Request, now_s: float) -> StopReplica | None:
        """Release the request's place on a replica, which is stopped if it drains and has no other request."""
        replica = self._cluster.replicas.get(replica_id or "")
        if replica is None or request.facts.id not in replica.ongoing:
            return None
        self._cluster.end_request(replica.id, request.facts.id, now_s)
        return None if replica.ongoing else self._scaling.became_idle(replica, now_s)

    def _learn(self, event: RequestMoved | MoveFailed) -> None:
        for sample in event.samples:
            self._scaling.estimator.observe_resume(sample)

    def validate(self) -> None:
        """Assert the invariants of migrations."""
        assert len(self.moving) <= self.limits.moves_max
        assert self.moving == {name: one.target for name, one in self._requests.items() if one.target is not None}
        assert self._to == Counter(self.moving.values())
        assert all(num <= self.limits.per_target_max for num in self._to.values())
        for request_id, target in self.moving.items():
            assert request_id in self._cluster.replicas[target].ongoing, f"{request_id} has no place at {target}"
