"""When and why a daemon ends: it was stopped, or a part that it needs can't work any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from sllm_vllm.errors import DaemonFailed

logger = logging.getLogger(__name__)

OVERDUE_STATUS = 1


class Stopped(Exception):
    """A daemon was stopped while it started."""


class Ending:
    """What a daemon waits for. Lives on its loop, which runs in the main thread.

    Args:
        within_s: after SIGTERM or SIGINT the process is gone within this time, even if a system call blocks it.
    """

    def __init__(self, *, within_s: float) -> None:
        self._within_s = within_s
        self._reason = ""
        self._ended = asyncio.Event()
        self._starting: asyncio.Task[object] | None = None
        self._is_overdue_armed = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
            # Called in the main thread also where a system call blocks the loop, which then never calls `stop`.
            signal.signal(number, self._arm)

    def stop(self) -> None:
        """End the daemon as it was asked to."""
        self._ended.set()
        if self._starting is not None:
            self._starting.cancel()

    def fail(self, reason: str) -> None:
        """End it because it can't work any more; the first reason counts."""
        self._reason = self._reason or reason
        self.stop()

    @property
    def has_begun(self) -> bool:
        """Whether the daemon has to end."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Return when the daemon has to end."""
        await self._ended.wait()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """What is done inside ends when the daemon is stopped.

        Raises:
            Stopped: it was.
        """
        self._starting = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if not self._ended.is_set():
                raise
            raise Stopped from None
        finally:
            self._starting = None

    def check(self) -> None:
        """Tell how it ended, once everything is closed.

        Raises:
            DaemonFailed: it can't work any more.
        """
        if self._reason:
            raise DaemonFailed(f"ended because {self._reason}")

    def _arm(self, number: int, frame: FrameType | None) -> None:
        if not self._is_overdue_armed:
            self._is_overdue_armed = True
            timer = threading.Timer(self._within_s, self._end_now)
            timer.daemon = True
            timer.start()

    def _end_now(self) -> None:
        logger.critical("event=end_overdue seconds=%.0f", self._within_s)
        os._exit(OVERDUE_STATUS)
