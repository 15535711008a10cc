"""Replicas that have just failed a request: usually their end is about to be reported. Pure."""

from __future__ import annotations

SUSPECT_S = 1.0
"""How long a failing replica gets no requests."""


class Suspects:
    """Failing replicas, and until when each gets no requests."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def __contains__(self, replica: object) -> bool:
        return replica in self._until_s

    def add(self, replica: str, now_s: float) -> None:
        """Note that a replica failed a request."""
        self._until_s[replica] = now_s + SUSPECT_S

    def discard(self, replica: str) -> None:
        """Forget a replica that is gone."""
        self._until_s.pop(replica, None)

    def cleared(self, now_s: float) -> list[str]:
        """Remove and return the replicas that may get requests again."""
        found = [replica for replica, until_s in self._until_s.items() if until_s <= now_s]
        for replica in found:
            del self._until_s[replica]
        return found
