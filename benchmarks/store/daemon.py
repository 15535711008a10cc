"""Runs the store's real daemon in its own process, for benchmarks: starts it, sends it orders, stops it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common.supervise import ROOT
from sllm_vllm.config import StoreConfig, child_environment
from sllm_vllm.errors import StoreUnavailable
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Order

START_TIMEOUT_S = 120.0
ORDER_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05
_SCRIPT = """
import logging, sys
from sllm_vllm.config import StoreConfig
from sllm_vllm.store.daemon import serve
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
sys.exit(serve(StoreConfig.model_validate_json(sys.argv[1])))
"""


class DaemonFailed(Exception):
    """The daemon did not start, or does not have what it should. The message is written for the user."""


class StoreDaemon:
    """One daemon, as a context manager that starts it, waits until its memory is claimed, and stops it.

    Args:
        log: file for its output.
        environment: added to this process's environment.
    """

    def __init__(self, config: StoreConfig, *, log: Path, environment: Mapping[str, str]) -> None:
        self.config = config
        self.log = log
        self._environment = child_environment(**environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            command = [sys.executable, "-c", _SCRIPT, self.config.model_dump_json()]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> StoreClient:
        """Open a new connection to the daemon."""
        return StoreClient(self.config.socket_path, timeout_s=20.0)

    def status(self) -> dict[str, Any]:
        """The daemon's status."""
        with self.client() as client:
            return client.order(Order(order="status"))

    def prefetch_s(self, checkpoint: str) -> float:
        """Seconds to bring a whole checkpoint into the pool.

        Raises:
            DaemonFailed: not all of it is resident afterwards.
        """
        with self.client() as client:
            start = time.perf_counter()
            order = Order(order="prefetch", checkpoint=checkpoint, wait=True)
            told = client.order(order, timeout_s=ORDER_TIMEOUT_S)
            seconds = time.perf_counter() - start
        if told["resident_spans"] != told["spans"]:
            raise DaemonFailed(f"{checkpoint}: {told['resident_spans']} of {told['spans']} spans are resident")
        return seconds

    def begin_prefetch(self, checkpoint: str) -> None:
        """Order a prefetch without waiting for it."""
        with self.client() as client:
            client.order(Order(order="prefetch", checkpoint=checkpoint), timeout_s=ORDER_TIMEOUT_S)

    def evict(self, checkpoint: str) -> None:
        """Evict a checkpoint from the pool; waits while clients hold parts of it.

        Raises:
            DaemonFailed: it is still held after ``STOP_TIMEOUT_S``.
        """
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        with self.client() as client:
            while client.order(Order(order="evict", checkpoint=checkpoint), timeout_s=60.0)["remaining_spans"]:
                if time.monotonic() > deadline_s:
                    raise DaemonFailed(f"{checkpoint}: it is still held")
                time.sleep(_POLL_S)

    def wait_idle(self) -> None:
        """Wait until no job of any kind is queued or running, and no client holds a lease.

        Raises:
            DaemonFailed: the daemon is still busy after ``ORDER_TIMEOUT_S``.
        """
        deadline_s = time.monotonic() + ORDER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            told = self.status()
            if not told["leases"] and not any(sum(counts.values()) for counts in told["jobs"].values()):
                return
            time.sleep(_POLL_S)
        raise DaemonFailed("the daemon does not come to rest")

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if self._process.poll() is not None:
                raise DaemonFailed(f"the daemon ended: {self._last_line()}")
            if self._answers() and (not self.config.prefault or "event=memory_claimed" in self.log.read_text()):
                return
            time.sleep(_POLL_S)
        raise DaemonFailed(f"the daemon was not ready after {START_TIMEOUT_S:.0f} s")

    def _answers(self) -> bool:
        try:
            return bool(self.status()["pid"] == self.pid)
        except StoreUnavailable:
            return False

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
