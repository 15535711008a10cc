"""Engines that died, and which request may have killed them. Pure; owned by ``RouterCore``.

Only a request that its engine had not begun to answer (no byte, no token) is suspected: once an answer has begun, the
engine has survived the request. What follows from a death depends on the requests suspected at its first sign:

=============================  ==================================================================================
suspected                      what follows
=============================  ==================================================================================
none                           nothing: streams continue on other replicas
one request                    it is refused, and so is every request with the same digest for ``quarantine_s``.
                               Exception: if an engine has answered that digest lately (a health probe's, say), the
                               request is tried alone first, because a killer kills the first engine it reaches
several                        each is tried alone on a replica that serves no other request, see ``trials.py``;
                               their digests stay suspected for ``quarantine_s``, so repeats are tried alone, too
a node was lost, an operator   none is suspected; each is sent to another replica
ended it, or it never ended
=============================  ==================================================================================

A request that could not be delivered, or that its engine refused, is not suspected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sllm_vllm.router.core.facts import FailureSign, RequestFacts

DELIVERED = (FailureSign.BROKE_OFF, FailureSign.CORE_DIED)
"""Signs that an engine may have died of a request that was delivered to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known about a death. ``held``: suspects whose failure was reported and whose client still waits."""

    replica: str
    has_died: bool
    suspects: tuple[RequestFacts, ...]
    held: tuple[str, ...]
    reason: str = ""


@dataclass(slots=True)
class _Death:
    until_s: float
    suspects: dict[str, RequestFacts]
    unheard: set[str]
    """Suspects for which neither a failure nor an answer has been reported yet."""
    held: dict[str, None] = field(default_factory=dict)
    has_died: bool | None = None
    """None until its agent or its API server says."""
    reason: str = ""

    def is_due(self, now_s: float) -> bool:
        return now_s >= self.until_s or (self.has_died is not None and not self.unheard)


class Deaths:
    """Replicas that seem to have died, each from its first sign of death until its verdict.

    Args:
        wait_s: longest wait for a verdict; an engine not reported dead by then is taken to be alive.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._deaths: dict[str, _Death] = {}

    def __contains__(self, request: object) -> bool:
        return any(request in one.held for one in self._deaths.values())

    @property
    def num_held(self) -> int:
        """Number of requests that wait for a verdict."""
        return sum(len(one.held) for one in self._deaths.values())

    def suspect(self, replica: str, facts: Iterable[RequestFacts], now_s: float) -> None:
        """Note a first sign that the replica died. Later signs change nothing.

        ``facts``: the requests that it had and had not begun to answer.
        """
        if replica not in self._deaths:
            suspects = {one.id: one for one in facts}
            self._deaths[replica] = _Death(now_s + self._wait_s, suspects, set(suspects))

    def failed(self, replica: str, request: str, sign: FailureSign) -> bool:
        """Record a request's failure; return whether the request waits for the verdict."""
        death = self._deaths.get(replica)
        if death is None:
            return False
        if sign is FailureSign.CORE_DIED:
            death.has_died = True
        death.unheard.discard(request)
        if sign not in DELIVERED or request not in death.suspects:
            death.suspects.pop(request, None)
            return False
        death.held[request] = None
        return True

    def answered(self, replica: str, request: str) -> None:
        """Clear a suspect whose answer had begun, whether that is reported before or after the failure."""
        if (death := self._deaths.get(replica)) is not None:
            death.suspects.pop(request, None)
            death.unheard.discard(request)

    def left(self, request: str) -> None:
        """Note that the request's client left. The request stays a suspect."""
        for death in self._deaths.values():
            death.held.pop(request, None)
            death.unheard.discard(request)

    def ended(self, replica: str, reason: str, *, is_fault: bool) -> None:
        """Record that the replica ended. ``is_fault``: it ended without having been told to."""
        if (death := self._deaths.get(replica)) is not None:
            death.has_died, death.reason = is_fault, reason
            if not is_fault:
                death.unheard.clear()

    def due(self, now_s: float) -> list[Verdict]:
        """Return the verdicts that can be given now, each once."""
        found = [name for name, death in self._deaths.items() if death.is_due(now_s)]
        return [_verdict(name, self._deaths.pop(name)) for name in found]


def _verdict(replica: str, death: _Death) -> Verdict:
    suspects = tuple(death.suspects.values()) if death.has_died else ()
    return Verdict(replica, bool(death.has_died), suspects, tuple(death.held), death.reason)


class DigestTable:
    """Digests of requests, each until an expiry time; at most ``num_max``, the oldest entry is dropped first.

    The empty digest, of a request whose body was not hashed, is never stored.
    """

    def __init__(self, num_max: int) -> None:
        self._num_max = num_max
        self._until_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, digest: str, until_s: float) -> None:
        """Store a digest until ``until_s``, or until its present expiry if that is later."""
        if not digest:
            return
        self._until_s[digest] = max(until_s, self._until_s.pop(digest, until_s))
        if len(self._until_s) > self._num_max:  # entries all live equally long, so the first added expires first
            del self._until_s[next(iter(self._until_s))]

    def discard(self, digest: str) -> None:
        """Remove a digest, if it is stored."""
        self._until_s.pop(digest, None)

    def seconds_left(self, digest: str, now_s: float) -> float:
        """Return the seconds until the digest expires; 0 if it is not stored."""
        until_s = self._until_s.get(digest, now_s)
        if until_s <= now_s:
            self._until_s.pop(digest, None)
        return max(0.0, until_s - now_s)
