"""Devices for reading and writing, each with its own schedule. Runs on the daemon's event loop.

A device runs jobs (coroutine functions) when ``core/schedule.py`` decides: loads before fills and writes. Disk jobs do
their work in the device's thread pools, network jobs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sllm_vllm.store.core.schedule import IoSchedule, Urgency

# Measures what a hop (disk, page cache, network, write) delivered: bytes, and the time it was busy. Pure.


_HALVED_AT_NBYTES = 8 << 30
"""Once the counts behind the measured rate exceed this, they are halved, so that older transfers lose weight."""


@dataclass(slots=True)
class HopMeter:
    """Counts concurrent transfers, each once it has ended. Time in which several ran is counted once."""

    nbytes: int = 0
    seconds: float = 0.0
    _booked_to_s: float = 0.0
    _recent_nbytes: float = 0.0
    _recent_s: float = 0.0

    def book(self, nbytes: int, start_s: float, end_s: float) -> None:
        """Count a transfer that ran from ``start_s`` to ``end_s``."""
        busy_s = max(0.0, end_s - max(start_s, self._booked_to_s))
        self._booked_to_s = max(self._booked_to_s, end_s)
        if self._recent_nbytes > _HALVED_AT_NBYTES:
            self._recent_nbytes, self._recent_s = self._recent_nbytes / 2, self._recent_s / 2
        self.nbytes += nbytes
        self.seconds += busy_s
        self._recent_nbytes += nbytes
        self._recent_s += busy_s

    @property
    def bps(self) -> float | None:
        """Recent bytes per second while busy; None before anything was measured."""
        return self._recent_nbytes / self._recent_s if self._recent_nbytes and self._recent_s else None


T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    """A job that is queued or running."""

    run: Callable[[], Awaitable[None]]
    urgency: Urgency
    task: asyncio.Task[None] | None = None


class Device:
    """Runs jobs within the limits of one device. Owned by the daemon's loop.

    Args:
        num_readers, num_writers: most concurrent reads and writes.
        starve_s, pauses: see ``IoSchedule``.
    """

    def __init__(self, num_readers: int, num_writers: int, *, starve_s: float, pauses: bool) -> None:
        self._schedule = IoSchedule(num_readers, num_writers, starve_s=starve_s, pauses=pauses)
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="sllm-read")
        self._writers = ThreadPoolExecutor(num_writers, thread_name_prefix="sllm-write")
        self._jobs: dict[int, _Job] = {}
        self._num_jobs = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def submit(self, urgency: Urgency, run: Callable[[], Awaitable[None]]) -> int:
        """Queue ``run``, which must not raise; it is awaited in its turn. Returns the job's number for ``promote``."""
        self._num_jobs += 1
        job = self._num_jobs
        self._jobs[job] = _Job(run, urgency)
        self._schedule.add(job, urgency, self._loop.time())
        self._pump()
        return job

    def promote(self, job: int) -> None:
        """Turn a queued fill into a load, because an engine now waits for it."""
        if job in self._jobs:
            self._schedule.promote(job)
            self._jobs[job].urgency = Urgency.LOAD
            self._pump()

    async def in_reader(self, function: Callable[[], T]) -> T:
        """Call ``function`` in a reader thread."""
        return await self._loop.run_in_executor(self._readers, function)

    async def in_writer(self, function: Callable[[], T]) -> T:
        """Call ``function`` in a writer thread."""
        return await self._loop.run_in_executor(self._writers, function)

    def counts(self) -> dict[Urgency, tuple[int, int]]:
        """Return the numbers of queued and running jobs by urgency."""
        found = {urgency: [0, 0] for urgency in Urgency}
        for job in self._jobs.values():
            found[job.urgency][job.task is not None] += 1
        return {urgency: (queued, running) for urgency, (queued, running) in found.items()}

    async def close(self) -> None:
        """Drop queued jobs, cancel running ones, and wait for the threads to end."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        self._jobs.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in (self._readers, self._writers):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    def _pump(self) -> None:
        for number in self._schedule.take(self._loop.time()):
            job = self._jobs[number]
            job.task = self._loop.create_task(self._run(number, job))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (delay := self._schedule.wakeup_s(self._loop.time())) is not None:
            self._timer = self._loop.call_later(delay, self._pump)

    async def _run(self, number: int, job: _Job) -> None:
        try:
            await job.run()
        finally:
            if self._jobs.pop(number, None) is not None:
                self._schedule.finished(number, self._loop.time())
                self._pump()
