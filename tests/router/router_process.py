"""A whole router as a process, over engines that start in a moment; asked over real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.config import child_environment
from sllm_vllm.node.client import NodeClient
from tests.waiting import wait_until

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"
ANSWER_MAX_S = 60.0
_URL = re.compile(r"event=router_serving url=(\S+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and headers."""

    status: int
    body: Any
    headers: dict[str, str]


@dataclass(slots=True)
class RouterUnderTest:
    """A router that serves ``directory/router.yaml``."""

    directory: Path
    process: subprocess.Popen[bytes]
    url: str

    @property
    def log(self) -> str:
        return (self.directory / "router.log").read_text()

    @property
    def node(self) -> NodeClient:
        """The agent's socket."""
        return NodeClient(self.directory / "node" / "socket")

    def post(self, model: str, path: str = "/v1/completions", *, key: str = "", **body: Any) -> Answer:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps({"model": model, "prompt": "hello", **body}).encode()
        return self._send(urllib.request.Request(f"{self.url}{path}", data, headers))

    def admin(self, path: str, method: str = "GET", body: object = None) -> Answer:
        key = (self.directory / "node" / "admin.key").read_text().strip()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        return self._send(urllib.request.Request(f"{self.url}/sllm/v1/{path}", data, headers, method=method))

    def post_later(self, pool: ThreadPoolExecutor, model: str) -> Future[Answer]:
        return pool.submit(self.post, model)

    def pids(self, model: str) -> list[int]:
        """Of a model's engines that live."""
        return [one.pid for one in self.node.report().replicas if one.model.endswith(f"/{model}") and one.pid]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_MAX_S) as answer:
                return Answer(answer.status, json.loads(answer.read() or b"null"), _lower(answer.headers.items()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read() or b"null"), _lower(error.headers.items()))


def write_config(directory: Path, *models: str, slots: int = 2, **sections: Any) -> None:
    """A configuration with fake engines; a model is called as it behaves."""
    values = {
        "server": {"port": 0},
        "node": {
            "slots": slots,
            "memory": "1GiB",
            "warm": False,
            "node_dir": "./node",
            "engine_command": [sys.executable, str(FAKE_ENGINE), "serve"],
        },
        "store": {"directory": "./store"},
        "models": [{"name": name, "source": f"/models/{name}"} for name in models],
        **sections,
    }
    staging = directory / "router.yaml.new"
    staging.write_text(json.dumps(values))  # JSON is YAML
    os.replace(staging, directory / "router.yaml")


@contextmanager
def running_router(directory: Path) -> Iterator[RouterUnderTest]:
    """Start one, and end it, if it has not ended."""
    (directory / "store").mkdir(exist_ok=True)
    log = directory / "router.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sllm-vllm")), "serve", str(directory / "router.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        wait_until(lambda: _URL.search(log.read_text()) or process.poll() is not None, "the router")
        found = _URL.search(log.read_text())
        assert found is not None, log.read_text()
        yield RouterUnderTest(directory, process, found[1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _lower(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}
