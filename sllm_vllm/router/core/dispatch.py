"""Which of a model's ready replicas gets a request. Pure; asked by the router's core."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, TypeVar

ONGOING_SLACK = 1
"""How many requests more than the least a replica may have and still be chosen for its prefix cache."""


class Candidate(Protocol):
    """What is looked at of a replica. Nothing is changed."""

    @property
    def id(self) -> str:
        """Breaks ties."""

    @property
    def ongoing(self) -> Collection[str]:
        """The requests it has."""

    @property
    def prefixes(self) -> Mapping[str, float]:
        """When it last had a request with this prefix."""


Chosen = TypeVar("Chosen", bound=Candidate)


def choose_replica(candidates: Iterable[Chosen], prefix: str) -> Chosen | None:
    """The one with the fewest requests, or nearly so and the prefix in its cache; None of none.

    All candidates must have room. Among those within one request of the fewest: the one that had ``prefix`` most
    recently, then the one with fewer requests, then the first id. An empty prefix is in no cache.
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
