"""Decides which read or write of one device may begin now. Pure. The rule is in DESIGN.md, "The I/O schedule"."""

from __future__ import annotations

import enum
import math


class Urgency(enum.IntEnum):
    """What a job is for, most urgent first."""

    LOAD = 0
    """A read that an engine waits for."""
    FILL = 1
    """A read that no engine waits for, such as a prefetch."""
    WRITE = 2
    """A write of the write-behind."""


class IoSchedule:
    """The jobs of one device. Loads and fills share the readers; writes use the writers.

    With ``pauses``, no fill or write begins while a load is queued or running, with one exception: if fills (or writes)
    are queued and none has begun for ``starve_s`` seconds, one begins anyway, before queued loads.
    """

    def __init__(self, num_readers: int, num_writers: int, *, starve_s: float, pauses: bool) -> None:
        assert num_readers >= 1
        assert num_writers >= 1
        self._starve_s = starve_s
        self._pauses = pauses
        self._num_workers = {Urgency.LOAD: num_readers, Urgency.FILL: num_readers, Urgency.WRITE: num_writers}
        self._queues: dict[Urgency, dict[int, None]] = {urgency: {} for urgency in Urgency}
        self._running: dict[int, Urgency] = {}
        self._waits_since_s = dict.fromkeys(Urgency, 0.0)
        """When a job of each kind last began, or when its queue last became non-empty, whichever is later."""
        self._now_s = -math.inf

    def add(self, job: int, urgency: Urgency, now_s: float) -> None:
        """Queue a job. ``job`` is a number that no queued or running job has."""
        self._advance(now_s)
        assert job not in self._running
        assert not any(job in queue for queue in self._queues.values())
        queue = self._queues[urgency]
        if not queue:
            self._waits_since_s[urgency] = now_s
        queue[job] = None

    def promote(self, job: int) -> None:
        """Turn a queued fill into a load, at the end of the loads' queue. Does nothing for any other job."""
        if job in self._queues[Urgency.FILL]:
            del self._queues[Urgency.FILL][job]
            self._queues[Urgency.LOAD][job] = None

    def cancel(self, job: int) -> bool:
        """Remove a queued job. Returns whether it was queued; a running job can't be cancelled."""
        for queue in self._queues.values():
            if job in queue:
                del queue[job]
                return True
        return False

    def take(self, now_s: float) -> list[int]:
        """Return the jobs that must begin now, and count them as running."""
        self._advance(now_s)
        starved = [kind for kind in (Urgency.FILL, Urgency.WRITE) if self._starves_in_s(kind, now_s) <= 0]
        begun = [self._begin(kind, now_s) for kind in starved if self._may_begin(kind)]
        for urgency in Urgency:
            while self._may_begin(urgency) and not self._is_paused(urgency):
                begun.append(self._begin(urgency, now_s))
        return begun

    def finished(self, job: int, now_s: float) -> None:
        """Record that a running job ended, successfully or not. The caller must call ``take`` afterwards."""
        self._advance(now_s)
        del self._running[job]

    def wakeup_s(self, now_s: float) -> float | None:
        """Return in how many seconds ``take`` must be called even if no job is added or finished; None if never."""
        paused = [kind for kind in Urgency if self._is_paused(kind) and self._may_begin(kind)]
        return min((max(0.0, self._starves_in_s(kind, now_s)) for kind in paused), default=None)

    def validate(self) -> None:
        """Assert every invariant."""
        queued = [job for queue in self._queues.values() for job in queue]
        assert len({*queued, *self._running}) == len(queued) + len(self._running), "a job is in two places"
        for urgency in Urgency:
            assert self._num_busy(urgency) <= self._num_workers[urgency]

    def _advance(self, now_s: float) -> None:
        assert now_s >= self._now_s, "the clock went back"
        self._now_s = now_s

    def _num_busy(self, urgency: Urgency) -> int:
        """Return how many of the workers that run this kind of job are busy."""
        is_write = urgency is Urgency.WRITE
        return sum((kind is Urgency.WRITE) == is_write for kind in self._running.values())

    def _may_begin(self, urgency: Urgency) -> bool:
        return bool(self._queues[urgency]) and self._num_busy(urgency) < self._num_workers[urgency]

    def _is_paused(self, urgency: Urgency) -> bool:
        if urgency is Urgency.LOAD or not self._pauses:
            return False
        return bool(self._queues[Urgency.LOAD]) or Urgency.LOAD in self._running.values()

    def _starves_in_s(self, urgency: Urgency, now_s: float) -> float:
        return self._waits_since_s[urgency] + self._starve_s - now_s

    def _begin(self, urgency: Urgency, now_s: float) -> int:
        job = next(iter(self._queues[urgency]))
        del self._queues[urgency][job]
        self._running[job] = urgency
        self._waits_since_s[urgency] = now_s
        return job
