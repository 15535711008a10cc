"""Requests that may have killed an engine, tried one at a time, each alone on its replica. Pure.

Part of ``RouterCore``; ``deaths.py`` decides which requests are suspects. Suspects of a model are tried one at a time,
each on a replica that has no request and gets no other one until the suspect is cleared: by its first byte or token, or
after ``trial_s``. So an engine that dies of a suspect serves no other request.

If a model may have more replicas, its last ready one is not risked before ``last_replica_s``; meanwhile another one is
started. If all replicas are busy, one of several gets nothing new until it is empty. If there is only one and it is
never empty, it gets nothing new from ``last_replica_s`` on, for ``trial_s`` at most, until it has begun to answer all
its requests; then the suspect is tried beside them.
"""

from __future__ import annotations

from sllm_vllm.router.core.cluster import Cluster, Replica, ReplicaState
from sllm_vllm.router.core.facts import FailureSign, PoisonLimits
from sllm_vllm.router.core.model_state import CoreState, Request

SUSPECT_S = 1.0
"""How long a failing replica gets no requests."""
UNREACHED_S = 10.0
"""The same for a replica that accepts no connection: it has most likely ended, which its agent reports within seconds.

Sent there again before that, a request would use up its attempts.
"""


class FailingReplicas:
    """Replicas that have just failed a request, and until when each gets none: usually their end is reported soon."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def __contains__(self, replica: object) -> bool:
        return replica in self._until_s

    def add(self, replica: str, sign: FailureSign, now_s: float) -> None:
        """Note that a replica failed a request."""
        for_s = UNREACHED_S if sign is FailureSign.UNREACHED else SUSPECT_S
        self._until_s[replica] = max(now_s + for_s, self._until_s.get(replica, now_s))

    def discard(self, replica: str) -> None:
        """Forget a replica that is gone."""
        self._until_s.pop(replica, None)

    def cleared(self, now_s: float) -> list[str]:
        """Remove and return the replicas that may get requests again."""
        found = [replica for replica, until_s in self._until_s.items() if until_s <= now_s]
        for replica in found:
            del self._until_s[replica]
        return found


EMPTY_MAX = 8
"""Replicas examined for a suspect, those with the fewest requests first."""


class Trials:
    """Which replicas are on trial, and which suspects wait. ``failing``: replicas that just failed a request."""

    def __init__(
        self, limits: PoisonLimits, core_state: CoreState, cluster: Cluster, *, failing: FailingReplicas
    ) -> None:
        self._limits = limits
        self._core_state = core_state
        self._cluster = cluster
        self._failing = failing
        self._reserved: dict[str, str] = {}
        """By model: the replica that gets no new request until it is empty."""

    def is_closed(self, replica: Replica) -> bool:
        """Whether the replica takes no request except a suspect."""
        return replica.id in self._core_state.on_trial or self._reserved.get(replica.model) == replica.id

    def waits(self, request: Request, now_s: float) -> None:
        """Note that a suspect was queued."""
        self._core_state.suspects_waiting.setdefault(request.facts.model, {}).setdefault(request.facts.id, now_s)

    def waits_no_more(self, request: Request) -> None:
        """Note that a suspect was sent to a replica, or left."""
        waiting = self._core_state.suspects_waiting.get(request.facts.model, {})
        waiting.pop(request.facts.id, None)
        if not waiting:
            self._core_state.suspects_waiting.pop(request.facts.model, None)
            self._reserved.pop(request.facts.model, None)

    def begin(self, request: Request, replica: str) -> None:
        """Note that a suspect was sent to a replica for its trial."""
        self.waits_no_more(request)
        self._core_state.on_trial[replica] = request.facts.id
        self._reserved.pop(request.facts.model, None)

    def end(self, replica: str, request: str) -> bool:
        """End the trial of a request that was cleared or left the replica; return whether it was on trial there."""
        if self._core_state.on_trial.get(replica) != request:
            return False
        del self._core_state.on_trial[replica]
        return True

    def tried(self) -> list[str]:
        """Return the suspects on trial."""
        return list(self._core_state.on_trial.values())

    def models(self) -> list[str]:
        """Return the models with suspects that wait or are on trial; for these, time alone may allow new dispatches."""
        requests = self._core_state.requests
        tried = [requests[name].facts.model for name in self._core_state.on_trial.values()]
        return [*self._core_state.suspects_waiting, *tried]

    def overdue(self, now_s: float) -> list[str]:
        """Return the suspects that their engines have survived for ``trial_s``."""
        requests = self._core_state.requests
        return [
            name
            for name in self._core_state.on_trial.values()
            if now_s - requests[name].dispatched_s >= self._limits.trial_s
        ]

    def choose(self, request: Request, now_s: float) -> Replica | None:
        """Return a replica to try the suspect on; None if there is none now."""
        model = request.facts.model
        if any(self._core_state.requests[name].facts.model == model for name in self._core_state.on_trial.values()):
            return None
        ready = [one for one in self._cluster.least_busy(model, EMPTY_MAX) if one.id not in self._failing]
        empty = next((one for one in ready if not one.ongoing), None)
        since_s = self._core_state.suspects_waiting.get(model, {}).get(request.facts.id, now_s)
        if empty is None:
            is_late = 0 <= now_s - since_s - self._limits.last_replica_s < self._limits.trial_s
            self._reserve(model, ready, num_least=1 if is_late else 2)
            return ready[0] if is_late and len(ready) == 1 and self._is_settled(ready[0]) else None
        is_last = len(self._cluster.replicas_of(model, ReplicaState.READY)) == 1
        may_have_more = self._core_state.models[model].spec.max_replicas > 1
        if is_last and may_have_more and now_s - since_s < self._limits.last_replica_s:
            return None
        return empty

    def _reserve(self, model: str, ready: list[Replica], *, num_least: int) -> None:
        """Reserve a replica, so that it runs empty, if at least ``num_least`` replicas serve the model, it included."""
        known = self._cluster.replicas.get(self._reserved.get(model, ""))
        if known is not None and known.state is ReplicaState.READY and len(ready) >= num_least:
            return
        self._reserved.pop(model, None)
        if len(ready) >= max(1, num_least):
            self._reserved[model] = ready[0].id

    def _is_settled(self, replica: Replica) -> bool:
        """Whether the replica has room and has begun to answer all its requests, so that none of them can kill it."""
        ongoing_max = self._core_state.models[replica.model].spec.ongoing_max
        return len(replica.ongoing) < ongoing_max and all(
            self._core_state.requests[name].is_proven for name in replica.ongoing
        )

    def validate(self) -> None:
        """Assert that a replica on trial has begun to answer all its other requests, and that the waiting suspects are
        exactly the queued ones."""
        models = [self._core_state.requests[name].facts.model for name in self._core_state.on_trial.values()]
        assert len(models) == len(set(models)), "two suspects of one model are tried at once"
        for replica_id, request_id in self._core_state.on_trial.items():
            request = self._core_state.requests[request_id]
            assert request.is_suspect, f"{request_id} is on trial"
            if (replica := self._cluster.replicas.get(replica_id)) is not None:
                others = [name for name in replica.ongoing if not self._core_state.requests[name].is_proven]
                assert others == [request_id], f"{request_id} is tried beside {replica.ongoing}"
        waiting = {
            (name, one.facts.model)
            for name, one in self._core_state.requests.items()
            if one.is_suspect and one.is_queued
        }
        assert waiting == {(name, model) for model, ids in self._core_state.suspects_waiting.items() for name in ids}
