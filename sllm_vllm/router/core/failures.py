"""Requests whose replica failed: sent elsewhere, continued elsewhere, tried alone, or refused. Pure.

Part of ``RouterCore``. ``deaths.py`` decides which requests are suspected, ``trials.py`` where suspects may go.
"""

from __future__ import annotations

from sllm_vllm.router.core.cluster import Cluster, Replica
from sllm_vllm.router.core.deaths import DELIVERED, Deaths, DigestTable, Verdict
from sllm_vllm.router.core.events import Refusal, RejectRequest, RequestFailed
from sllm_vllm.router.core.facts import FailureSign, RequestFacts, RouterLimits
from sllm_vllm.router.core.model_state import CoreState, Request
from sllm_vllm.router.core.trials import Trials

HARMLESS_FACTOR = 16
"""Digests of answered requests that are remembered, per digest of a refused one."""


class Failures:
    """Decides what happens to requests that lost their replica."""

    def __init__(self, limits: RouterLimits, core_state: CoreState, cluster: Cluster, *, trials: Trials) -> None:
        self._limits = limits
        self._models = core_state.models
        self._requests = core_state.requests
        self._cluster = cluster
        self._trials = trials
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

    def refusal(self, request: Request, reason: str, *, was_reached: bool = True) -> RejectRequest | None:
        """Return a request's refusal; None if it may be tried, or its answer continued, on another replica.

        Tries of replicas that could not be reached are limited only by the request's deadline.
        """
        if request.facts.model not in self._models:
            return RejectRequest(request.facts.id, Refusal.DELETED, reason)
        if not was_reached:
            return None
        num_tries = request.attempt - request.num_unreached
        may_try = self._may_resume(request) if request.has_begun else num_tries < self._limits.attempts_max
        return None if may_try else RejectRequest(request.facts.id, Refusal.ENGINE_FAILED, reason)

    def _may_resume(self, request: Request) -> bool:
        """Whether a stream may be continued on another replica; counts that it is.

        A stream whose engines died repeatedly becomes a suspect: it may be the cause, although each engine survived its
        beginning.
        """
        if not self._limits.moves.is_on or request.num_resumes >= self._limits.poison.resumes_max:
            return False
        request.is_suspect = request.is_suspect or request.num_resumes > 0
        request.num_resumes += 1
        return True

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

    def judged(self, now_s: float) -> list[tuple[Request, RejectRequest | None]]:
        """Return the requests that were held for the verdicts that are due: each is refused, or tried again (None)."""
        judged = []
        for verdict in self.deaths.due(now_s):
            until_s = now_s + self._limits.poison.quarantine_s
            was_harmless = [self._was_harmless(facts, now_s) for facts in verdict.suspects]
            is_alone = was_harmless == [False]
            for facts in verdict.suspects:
                (self.quarantined if is_alone else self.suspected).add(facts.digest, until_s)
            for name in verdict.held:
                request = self._requests[name]
                judged.append((request, self._judge(request, verdict, is_alone=is_alone)))
        return judged

    def _was_harmless(self, facts: RequestFacts, now_s: float) -> bool:
        """Whether an engine has answered such a request lately. Forgets it, as this death casts doubt on it."""
        found = self._harmless.seconds_left(facts.digest, now_s) > 0
        self._harmless.discard(facts.digest)
        return found

    def _judge(self, request: Request, verdict: Verdict, *, is_alone: bool) -> RejectRequest | None:
        request.is_held = False
        reason = verdict.reason or "its engine ended while it was being answered"
        if is_alone:
            return RejectRequest(request.facts.id, Refusal.KILLED_ENGINE, reason, self._limits.poison.quarantine_s)
        if verdict.suspects:
            request.is_suspect = True
        return self.refusal(request, reason)
