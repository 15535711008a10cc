"""Requests whose replica failed: sent elsewhere, continued elsewhere, tried alone, or refused. Pure.

Part of ``RouterCore``. ``deaths.py`` decides which requests are suspected, ``trials.py`` where suspects may go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sllm_vllm.router.core.cluster import Cluster, Replica
from sllm_vllm.router.core.deaths import DELIVERED, Deaths, DigestTable, Verdict
from sllm_vllm.router.core.events import Refusal, RequestFailed
from sllm_vllm.router.core.facts import FailureSign, RequestFacts, RouterLimits
from sllm_vllm.router.core.model_state import Picture, Request
from sllm_vllm.router.core.trials import Trials

HARMLESS_FACTOR = 16
"""Digests of answered requests that are remembered, per digest of a refused one."""


class Refuse(Protocol):
    """Forgets a request and tells its client why it is refused."""

    def __call__(self, request: Request, why: Refusal, reason: str, /, *, retry_after_s: float | None = None) -> None:
        """``retry_after_s``: after how many seconds the client may try again."""


class Failures:
    """Decides what happens to requests that lost their replica.

    Args:
        enqueue: puts a request back into its model's queue.
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
        """Digests of requests that killed an engine."""
        self.suspected = DigestTable(limits.poison.digests_max)
        """Digests of requests of which one may have killed an engine."""
        self._harmless = DigestTable(HARMLESS_FACTOR * limits.poison.digests_max)
        """Digests of requests that an engine has answered."""

    # --------------------------------------------------------------------------------------------------- arriving

    def quarantine_left_s(self, facts: RequestFacts, now_s: float) -> float:
        """Return for how long such a request is still refused; 0 if it is not."""
        return self.quarantined.seconds_left(facts.digest, now_s)

    def is_suspected(self, facts: RequestFacts, now_s: float) -> bool:
        """Whether such a request has to be tried alone."""
        return self.suspected.seconds_left(facts.digest, now_s) > 0

    # ---------------------------------------------------------------------------------------------------- failing

    def unproven(self, replica: Replica) -> list[RequestFacts]:
        """Return the requests that a replica has and has not begun to answer."""
        found = [self._requests[name] for name in sorted(replica.ongoing)]
        return [one.facts for one in found if one.replica == replica.id and not one.is_proven]

    def failed(self, request: Request, event: RequestFailed, now_s: float) -> bool:
        """Record that a request's replica failed it; return whether it must wait for a verdict.

        Called while the request still has its place on the replica.
        """
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

    def again(self, request: Request, reason: str, now_s: float, *, was_reached: bool = True) -> None:
        """Send a request to another replica, or continue its answer there, if it may still be tried; else refuse it.

        Tries of replicas that could not be reached are limited only by the request's deadline.
        """
        if request.facts.model not in self._models:
            self._refuse(request, Refusal.DELETED, reason)
        elif not was_reached:
            self._enqueue(request, now_s)
        elif request.has_begun:
            self._resume(request, reason, now_s)
        elif request.attempt - request.num_unreached >= self._limits.attempts_max:
            self._refuse(request, Refusal.ENGINE_FAILED, reason)
        else:
            self._enqueue(request, now_s)

    def _resume(self, request: Request, reason: str, now_s: float) -> None:
        """Continue a stream on another replica.

        A stream whose engines died repeatedly becomes a suspect: it may be the cause, although each engine survived its
        beginning.
        """
        if not self._limits.moves.is_on or request.num_resumes >= self._limits.poison.resumes_max:
            self._refuse(request, Refusal.ENGINE_FAILED, reason)
            return
        request.is_suspect = request.is_suspect or request.num_resumes > 0
        request.num_resumes += 1
        self._enqueue(request, now_s)

    def answered(self, facts: RequestFacts, now_s: float) -> None:
        """Note that an engine has survived such a request."""
        self._harmless.add(facts.digest, now_s + self._limits.poison.quarantine_s)
        self.quarantined.discard(facts.digest)

    def cleared(self, request: Request) -> bool:
        """Clear a suspect; return whether it was on trial, so that its replica takes other requests again."""
        request.is_suspect = False
        self.suspected.discard(request.facts.digest)
        return request.replica is not None and self._trials.end(request.replica, request.facts.id)

    # ---------------------------------------------------------------------------------------------------- verdicts

    def judge(self, now_s: float) -> None:
        """Act on the verdicts that are due: refuse the requests held for them, or try them again."""
        for verdict in self.deaths.due(now_s):
            until_s = now_s + self._limits.poison.quarantine_s
            was_harmless = [self._was_harmless(facts, now_s) for facts in verdict.suspects]
            is_alone = was_harmless == [False]
            for facts in verdict.suspects:
                (self.quarantined if is_alone else self.suspected).add(facts.digest, until_s)
            for name in verdict.held:
                self._judge(self._requests[name], verdict, now_s, is_alone=is_alone)

    def _was_harmless(self, facts: RequestFacts, now_s: float) -> bool:
        """Whether an engine has answered such a request lately. Forgets it, as this death casts doubt on it."""
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
