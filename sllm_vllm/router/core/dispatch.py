"""Which of a model's ready replicas gets a request. Pure; called by the router's core."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, TypeVar

ONGOING_SLACK = 1
"""How many requests more than the least busy replica one may have and still be chosen for its prefix cache."""


class Candidate(Protocol):
    """The part of a replica that the choice reads."""

    @property
    def id(self) -> str:
        """Id of the replica; breaks ties."""

    @property
    def ongoing(self) -> Collection[str]:
        """Ids of its requests."""

    @property
    def prefixes(self) -> Mapping[str, float]:
        """For each prefix, when the replica last had a request with it."""


Chosen = TypeVar("Chosen", bound=Candidate)


def choose_replica(candidates: Iterable[Chosen], prefix: str) -> Chosen | None:
    """Choose the replica with the fewest requests, or one nearly as free that has the prefix cached.

    All candidates must have room; without candidates, returns None. Among those within ``ONGOING_SLACK`` requests of
    the fewest, prefers the one that had ``prefix`` most recently, then fewer requests, then the smaller id. An empty
    prefix is in no cache.
    """
    counted = [(len(candidate.ongoing), candidate) for candidate in candidates]
    if not counted:
        return None
    num_most = min(num for num, _ in counted) + ONGOING_SLACK
    never_s = float("-inf")

    def rank(entry: tuple[int, Chosen]) -> tuple[float, int, str]:
        num, candidate = entry
        seen_s = candidate.prefixes.get(prefix, never_s) if prefix else never_s
        return -seen_s, num, candidate.id

    return min((entry for entry in counted if entry[0] <= num_most), key=rank)[1]
