"""Replicas that have just failed a request: usually their end is about to be reported. Pure."""

from __future__ import annotations

from sllm_vllm.router.core.facts import FailureSign

SUSPECT_S = 1.0
"""How long a failing replica gets no requests."""
UNREACHED_S = 10.0
"""The same for a replica that accepts no connection: it has most likely ended, which its agent reports within seconds.

Sent there again before that, a request would use up its attempts.
"""


class Suspects:
    """Failing replicas, and until when each gets no requests."""

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
