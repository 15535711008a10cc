"""Requests whose replica failed: sent elsewhere, continued elsewhere, tried alone, or refused. Pure.

``RouterCore``'s part about engines that die. ``deaths.py`` says who is suspected, ``trials.py`` where suspects may go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sllm_vllm.router.core.cluster import Cluster, Replica
from sllm_vllm.router.core.deaths import DELIVERED, Deaths, DigestTable, Verdict
from sllm_vllm.router.core.events import Refusal, RequestFailed
from sllm_vllm.router.core.facts import FailureSign, RequestFacts
from sllm_vllm.router.core.limits import RouterLimits
from sllm_vllm.router.core.model_state import Picture, Request
from sllm_vllm.router.core.trials import Trials

HARMLESS_FACTOR = 16
"""So many times as many digests of answered requests are remembered as of those that are refused."""


class Refuse(Protocol):
    """Takes a request out of the picture and tells its client."""

    def __call__(self, request: Request, why: Refusal, reason: str, /, *, retry_after_s: float | None = None) -> None:
        """``retry_after_s``: when it may come back."""


class Failures:
    """What becomes of requests that lost their replica.

    Args:
        enqueue: has a request wait for a replica (again).
        refuse: see ``Refuse``.
    """

    def __init__(
        self,
        limits: RouterLimits,
        picture: Picture,
        cluster: Cluster,
        *,
        trials: Trials,
        enqueue: Callable[[Request, float], None],
        refuse: Refuse,
    ) -> None:
        self._limits = limits
        self._models = picture.models
        self._requests = picture.requests
        self._cluster = cluster
        self._trials = trials
        self._enqueue = enqueue
        self._refuse = refuse
        self.deaths = Deaths(limits.poison.verdict_s)
        self.quarantined = DigestTable(limits.poison.digests_max)
        """Of requests that killed an engine."""
        self.suspected = DigestTable(limits.poison.digests_max)
        """Of requests one of which may have killed one."""
        self._harmless = DigestTable(HARMLESS_FACTOR * limits.poison.digests_max)
        """Of requests that an engine has answered."""

    # --------------------------------------------------------------------------------------------------- arriving

    def quarantine_left_s(self, facts: RequestFacts, now_s: float) -> float:
        """For how long it is refused; 0: it is not."""
        return self.quarantined.seconds_left(facts.digest, now_s)

    def is_suspected(self, facts: RequestFacts, now_s: float) -> bool:
        """Whether it has to be tried alone."""
        return self.suspected.seconds_left(facts.digest, now_s) > 0

    # ---------------------------------------------------------------------------------------------------- failing

    def unproven(self, replica: Replica) -> list[RequestFacts]:
        """What a replica has and has not answered yet."""
        found = [self._requests[name] for name in sorted(replica.ongoing)]
        return [one.facts for one in found if one.replica == replica.id and not one.is_proven]

    def failed(self, request: Request, event: RequestFailed, now_s: float) -> bool:
        """Its replica failed it, and it is still there; whether it has to wait until more is known."""
        assert request.replica is not None
        name, replica_id = request.facts.id, request.replica
        request.is_proven = request.is_proven or event.is_proven
        request.has_begun = request.has_begun or event.has_begun
        replica = self._cluster.replicas.get(replica_id)
        if replica is not None and event.sign in DELIVERED:
            self.deaths.suspect(replica_id, self.unproven(replica), now_s)
        if request.is_proven:
            self.deaths.answered(replica_id, name)
            if event.sign is FailureSign.CORE_DIED:
                self.deaths.failed(replica_id, name, event.sign)
            return False
        request.is_held = self.deaths.failed(replica_id, name, event.sign)
        return request.is_held

    def again(self, request: Request, reason: str, now_s: float) -> None:
        """Send it elsewhere, or have it continued there, as long as it may be."""
        if request.facts.model not in self._models:
            self._refuse(request, Refusal.DELETED, reason)
        elif request.has_begun:
            self._resume(request, reason, now_s)
        elif request.attempt >= self._limits.attempts_max:
            self._refuse(request, Refusal.ENGINE_FAILED, reason)
        else:
            self._enqueue(request, now_s)

    def _resume(self, request: Request, reason: str, now_s: float) -> None:
        """A stream whose engines die again and again may be what they die of, though none died of its beginning."""
        if not self._limits.moves.is_on or request.num_resumes >= self._limits.poison.resumes_max:
            self._refuse(request, Refusal.ENGINE_FAILED, reason)
            return
        request.is_suspect = request.is_suspect or request.num_resumes > 0
        request.num_resumes += 1
        self._enqueue(request, now_s)

    def answered(self, facts: RequestFacts, now_s: float) -> None:
        """An engine has survived such a request."""
        self._harmless.add(facts.digest, now_s + self._limits.poison.quarantine_s)
        self.quarantined.discard(facts.digest)

    def cleared(self, request: Request) -> bool:
        """It can't have killed an engine; whether it was on trial, and its replica takes others again."""
        request.is_suspect = False
        self.suspected.discard(request.facts.digest)
        return request.replica is not None and self._trials.end(request.replica, request.facts.id)

    # ---------------------------------------------------------------------------------------------------- verdicts

    def judge(self, now_s: float) -> None:
        """Do with those that were held what is known now."""
        for verdict in self.deaths.due(now_s):
            until_s = now_s + self._limits.poison.quarantine_s
            was_harmless = [self._was_harmless(facts, now_s) for facts in verdict.suspects]
            is_alone = was_harmless == [False]
            for facts in verdict.suspects:
                (self.quarantined if is_alone else self.suspected).add(facts.digest, until_s)
            for name in verdict.held:
                self._judge(self._requests[name], verdict, now_s, is_alone=is_alone)

    def _was_harmless(self, facts: RequestFacts, now_s: float) -> bool:
        """Whether an engine has answered such a request lately; after this death that counts no more."""
        found = self._harmless.seconds_left(facts.digest, now_s) > 0
        self._harmless.discard(facts.digest)
        return found

    def _judge(self, request: Request, verdict: Verdict, now_s: float, *, is_alone: bool) -> None:
        request.is_held = False
        reason = verdict.reason or "its engine ended while it was being answered"
        if is_alone:
            self._refuse(request, Refusal.KILLED_ENGINE, reason, retry_after_s=self._limits.poison.quarantine_s)
            return
        if verdict.suspects:
            request.is_suspect = True
        self.again(request, reason, now_s)
