"""When and why a daemon ends: it was stopped, or a part that it needs has failed for good."""

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
    """The daemon was stopped during its startup."""


class Ending:
    """The event that ends a daemon. Lives on the daemon's event loop, which must run in the main thread.

    Handles SIGTERM and SIGINT.

    Args:
        within_s: seconds after SIGTERM or SIGINT at which the process is ended by force, even if a system call
            blocks it.
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
            # A plain handler also runs while a system call blocks the loop, and then the loop never calls `stop`.
            signal.signal(number, self._arm)

    def stop(self) -> None:
        """End the daemon without an error."""
        self._ended.set()
        if self._starting is not None:
            self._starting.cancel()

    def fail(self, reason: str) -> None:
        """End the daemon with an error. Only the first reason is kept."""
        self._reason = self._reason or reason
        self.stop()

    @property
    def has_begun(self) -> bool:
        """Whether the daemon is to end."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Return when the daemon is to end."""
        await self._ended.wait()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Cancel the block when the daemon is stopped during it.

        Raises:
            Stopped: the daemon was stopped.
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
        """Raise the reason given to ``fail``, if any. Called once everything is closed.

        Raises:
            DaemonFailed: ``fail`` was called.
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
