"""Lets starts wait for a warm parent that is importing where that is faster; keeps durations of imports in a file.

The file is in the agent's folder, so that the first start after a restart of the agent is planned with past durations.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from pathlib import Path
from typing import Protocol

from sllm_vllm.node.core.parent_wait import ParentForecast
from sllm_vllm.node.core.phases import StartPhase
from sllm_vllm.node.engine import Engine
from sllm_vllm.node.protocol import StartReport
from sllm_vllm.units import KIB

logger = logging.getLogger(__name__)

FILE_NBYTES_MAX = 64 * KIB
COLD_PHASES = tuple(
    phase.name.lower() for phase in (StartPhase.PROCESS, StartPhase.IMPORTS, StartPhase.INSPECT, StartPhase.WORKERS)
)
"""The phases of a cold start that a forked engine skips."""


class Importing(Protocol):
    """A parent that may be importing: ``WarmPool``."""

    @property
    def importing_s(self) -> float | None: ...
    async def wait_import(self, timeout_s: float) -> None: ...


class CalledOff(OSError):
    """The engine is to end before it has a process."""

    def __init__(self) -> None:
        super().__init__("it was stopped before it had a process")


class ParentWait:
    """One node's durations of imports, and the waits for them. Lives on the agent's loop.

    Args:
        path: the file; if it is missing or broken, it counts as empty.
        wait_s_max: see ``NodeConfig.warm_wait_s``.
    """

    def __init__(self, path: Path, *, num_cpus: int, wait_s_max: float) -> None:
        self._path = path
        self._wait_s_max = wait_s_max
        self._forecast = ParentForecast(num_cpus)
        self._forecast.restore(_read(path))

    def imported(self, seconds: float) -> None:
        """Record a parent that is ready."""
        self._forecast.note_import(seconds)
        self._write()

    def started(self, start: StartReport, *, is_beside_import: bool) -> None:
        """Record an engine that is ready; only a cold start that no import slowed down counts."""
        if start.is_warm is False and not is_beside_import:
            self._forecast.note_cold(sum(start.seconds.get(phase, 0.0) for phase in COLD_PHASES))
            self._write()

    def ready_in_s(self, pool: Importing) -> float | None:
        """How long a start that arrives now is expected to wait for the parent; None: it does not wait."""
        importing_s = pool.importing_s
        if importing_s is None or not self._forecast.wait_s(importing_s, wait_s_max=self._wait_s_max):
            return None
        return self._forecast.ready_in_s(importing_s)

    async def wait(self, pool: Importing, engine: Engine) -> None:
        """Wait for the parent that is importing, if that is expected to be faster than a cold start.

        Raises:
            CalledOff: the engine is to end.
        """
        importing_s = pool.importing_s
        wait_s = 0.0 if importing_s is None else self._forecast.wait_s(importing_s, wait_s_max=self._wait_s_max)
        if wait_s <= 0:
            return
        engine.awaits_parent()
        importing = asyncio.ensure_future(pool.wait_import(wait_s))
        called_off = asyncio.ensure_future(engine.called_off.wait())
        try:
            await asyncio.wait([importing, called_off], return_when=asyncio.FIRST_COMPLETED)
        finally:
            importing.cancel()
            called_off.cancel()
        if engine.called_off.is_set():
            raise CalledOff

    def _write(self) -> None:
        """Write the file. If that fails, the next agent starts without these durations."""
        partial = self._path.with_name(f"{self._path.name}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(partial, flags, 0o600), "w") as file:
                json.dump(self._forecast.to_record(), file)
            os.replace(partial, self._path)
        except OSError as error:
            logger.warning("event=imports_not_written path=%s reason=%s", self._path, error)


def _read(path: Path) -> object:
    """The file's content; None if it is missing or invalid."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return json.loads(file.read(FILE_NBYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return None
