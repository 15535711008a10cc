"""The real daemon in a process of its own, for tests: started, asked, killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.config import StoreConfig
from sllm_vllm.errors import StoreUnavailable
from sllm_vllm.store.client import StoreClient
from sllm_vllm.store.protocol import Order
from tests.support.waiting import DEADLINE_S, wait_until

_PR_SET_PDEATHSIG = 1
_SCRIPT = """
import logging, sys
from sllm_vllm.config import StoreConfig
from sllm_vllm.store.daemon import serve
logging.basicConfig(level=logging.INFO)
sys.exit(serve(StoreConfig.model_validate_json(sys.argv[1])))
"""


@dataclass(slots=True)
class RunningDaemon:
    """A daemon that answers."""

    config: StoreConfig
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def socket(self) -> Path:
        return self.config.socket_path

    def client(self) -> StoreClient:
        return StoreClient(self.socket, timeout_s=DEADLINE_S)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.order(Order(order="status"))

    def prefetch(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            return client.order(Order(order="prefetch", checkpoint=name, wait=True), timeout_s=DEADLINE_S)

    def evict(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            return client.order(Order(order="evict", checkpoint=name))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def store_daemon(store_dir: Path, *, log_dir: Path | None = None, **settings: Any) -> Iterator[RunningDaemon]:
    """Run a daemon on ``store_dir``; it is killed at the end, if it still runs."""
    config = StoreConfig(store_dir=store_dir, **{"memory_bytes": 64 << 20, "slot_bytes": 2 << 20, **settings})
    log = (log_dir or store_dir.parent) / f"{store_dir.name}-daemon-{os.getpid()}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, config.model_dump_json()],
            stdout=output,
            stderr=output,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    daemon = RunningDaemon(config, process, log)
    try:
        wait_until(lambda: process.poll() is not None or _answers(daemon), f"the daemon to answer, see {log}")
        assert process.poll() is None, log.read_text()
        yield daemon
    finally:
        daemon.kill()


def _answers(daemon: RunningDaemon) -> bool:
    """Whether it is this one that answers: another may own the socket."""
    try:
        return bool(daemon.status()["pid"] == daemon.process.pid)
    except StoreUnavailable:
        return False
