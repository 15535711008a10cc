"""Replicas that have just failed a request: most often they are about to be told gone. Pure."""

from __future__ import annotations

SUSPECT_S = 1.0
"""So long such a replica gets no request."""


class Suspects:
    """Who failed a request, and until when nobody is sent there."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def __contains__(self, replica: object) -> bool:
        return replica in self._until_s

    def add(self, replica: str, now_s: float) -> None:
        """It failed one."""
        self._until_s[replica] = now_s + SUSPECT_S

    def discard(self, replica: str) -> None:
        """It is gone."""
        self._until_s.pop(replica, None)

    def cleared(self, now_s: float) -> list[str]:
        """Those whose time is over; they are suspects no more."""
        found = [replica for replica, until_s in self._until_s.items() if until_s <= now_s]
        for replica in found:
            del self._until_s[replica]
        return found
