"""Engines that died, and which request may have killed them. Pure; owned by ``RouterCore``.

Only a request whose engine had not answered it (no byte, no token) is suspected: one that is being answered has shown
that its engine survives it. What follows from a death, by the requests that were suspected when it was first seen:

=============================  ==================================================================================
suspected                      what follows
=============================  ==================================================================================
none                           nothing: streams go on elsewhere
one request                    it is refused, and so is every request with the same digest for ``quarantine_s``;
                               but one whose digest an engine has answered lately, as a health probe's, is tried
                               alone first: what kills engines kills the first that it meets
several                        each is tried alone on a replica that serves no one else, see ``trials.py``; their
                               digests are suspected for ``quarantine_s``: who sends one again is tried alone, too
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
"""Signs of an engine that may have died of a request that it got."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a death. ``held``: suspects whose failure was told; a suspect whose client left is not."""

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
    """Suspects of which neither a failure nor an answer was told yet."""
    held: dict[str, None] = field(default_factory=dict)
    has_died: bool | None = None
    """None: its agent has not said."""
    reason: str = ""

    def is_due(self, now_s: float) -> bool:
        return now_s >= self.until_s or (self.has_died is not None and not self.unheard)


class Deaths:
    """Replicas that seem to have died, each from the first sign until all of its suspects were heard of.

    Args:
        wait_s: longest until a verdict; an engine that its agent has not seen end by then is taken for alive.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._deaths: dict[str, _Death] = {}

    def __contains__(self, request: object) -> bool:
        return any(request in one.held for one in self._deaths.values())

    @property
    def num_held(self) -> int:
        """Requests that wait for a verdict."""
        return sum(len(one.held) for one in self._deaths.values())

    def suspect(self, replica: str, facts: Iterable[RequestFacts], now_s: float) -> None:
        """There is a sign that it died; ``facts``: what it had not answered. A second sign changes nothing."""
        if replica not in self._deaths:
            suspects = {one.id: one for one in facts}
            self._deaths[replica] = _Death(now_s + self._wait_s, suspects, set(suspects))

    def failed(self, replica: str, request: str, sign: FailureSign) -> bool:
        """A request's failure was told; whether it waits for the verdict."""
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
        """It was, before or after the first sign: so it is no suspect."""
        if (death := self._deaths.get(replica)) is not None:
            death.suspects.pop(request, None)
            death.unheard.discard(request)

    def left(self, request: str) -> None:
        """Its client did. It stays a suspect."""
        for death in self._deaths.values():
            death.held.pop(request, None)
            death.unheard.discard(request)

    def ended(self, replica: str, reason: str, *, is_fault: bool) -> None:
        """Its agent says so. ``is_fault``: unasked."""
        if (death := self._deaths.get(replica)) is not None:
            death.has_died, death.reason = is_fault, reason
            if not is_fault:
                death.unheard.clear()

    def due(self, now_s: float) -> list[Verdict]:
        """Verdicts that can be given now; each once."""
        found = [name for name, death in self._deaths.items() if death.is_due(now_s)]
        return [_verdict(name, self._deaths.pop(name)) for name in found]


def _verdict(replica: str, death: _Death) -> Verdict:
    suspects = tuple(death.suspects.values()) if death.has_died else ()
    return Verdict(replica, bool(death.has_died), suspects, tuple(death.held), death.reason)


class DigestTable:
    """Digests of requests, each until a time; at most ``num_max``, the earliest to end goes first. An empty one, of
    a request whose body nobody hashed, is never in it."""

    def __init__(self, num_max: int) -> None:
        self._num_max = num_max
        self._until_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, digest: str, until_s: float) -> None:
        """From now on, and if it is there already for longer."""
        if not digest:
            return
        self._until_s[digest] = max(until_s, self._until_s.pop(digest, until_s))
        if len(self._until_s) > self._num_max:  # what was added first ends first: all stay equally long
            del self._until_s[next(iter(self._until_s))]

    def discard(self, digest: str) -> None:
        """No more."""
        self._until_s.pop(digest, None)

    def seconds_left(self, digest: str, now_s: float) -> float:
        """How long it still is in it; 0 if it is not."""
        until_s = self._until_s.get(digest, now_s)
        if until_s <= now_s:
            self._until_s.pop(digest, None)
        return max(0.0, until_s - now_s)
