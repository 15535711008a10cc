"""A whole router as a process, over engines that start in a moment; asked over real sockets."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_vllm.config import child_environment
from sllm_vllm.node.client import NodeClient
from tests.support.engine_http import ask_engine
from tests.support.waiting import DEADLINE_S, wait_until

_WITH_OTHER_LIMITS = """
import json, sys
from pathlib import Path
from sllm_vllm.cli.store import log_to_stderr
from sllm_vllm.router.config.sections import RouterConfig
from sllm_vllm.router.daemon import serve

def change(name, limits):
    made = getattr(RouterConfig, name)
    setattr(RouterConfig, name, lambda *args: (one := made(*args)).model_validate(one.model_dump() | limits))

change("node_config", json.loads(sys.argv[2]))
change("ingress_settings", json.loads(sys.argv[3]))
log_to_stderr()
sys.exit(serve(Path(sys.argv[1])))
"""
"""`sllm-vllm serve` with limits that its configuration has no keys for: by themselves they are minutes."""
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
_URL = re.compile(r"event=router_serving url=(\S+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and headers."""

    status: int
    body: Any
    headers: dict[str, str]


class Cut(Exception):
    """A stream ended without its end."""


class Stream:
    """A stream of events that is read one by one, down to the bytes: http.client takes one that was cut for whole."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._data = b""
        self.head = b"".join(iter(self._file.readline, b"\r\n"))

    def event(self) -> Any:
        """The next one's data; None at the proper end.

        Raises:
            Cut: there is none, and no end.
        """
        while b"\n\n" not in self._data:
            size = self._file.readline()
            if not size:
                raise Cut
            self._data += self._file.read(int(size, 16))
            self._file.readline()
            if size == b"0\r\n":
                assert not self._data
                self.close()
                return None
        event, _, self._data = self._data.partition(b"\n\n")
        data = event.removeprefix(b"data: ")
        return data.decode() if data == b"[DONE]" else json.loads(data)

    def rest(self) -> list[Any]:
        """All events that are still to come."""
        return list(iter(self.event, None))

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self._connection.close()


@dataclass(slots=True)
class RouterUnderTest:
    """A router that serves ``directory/router.yaml``."""

    directory: Path
    process: subprocess.Popen[bytes]
    url: str
    answer_s_max: float = DEADLINE_S
    admin_key: str = ""
    """Empty: the one that the router has written."""

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

    def get(self, path: str) -> Answer:
        return self._send(urllib.request.Request(f"{self.url}{path}"))

    def admin(self, path: str, method: str = "GET", body: object = None) -> Answer:
        key = self.admin_key or (self.directory / "node" / "admin.key").read_text().strip()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        return self._send(urllib.request.Request(f"{self.url}/sllm/v1/{path}", data, headers, method=method))

    def post_later(self, pool: ThreadPoolExecutor, model: str, **body: Any) -> Future[Answer]:
        return pool.submit(self.post, model, **body)

    def streaming(self, model: str, **body: Any) -> Stream:
        """A stream whose head has come."""
        asked = json.dumps({"model": model, "prompt": "hello", "stream": True, **body}).encode()
        connection = socket.create_connection(self.address, self.answer_s_max)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        connection.sendall(f"{head}{len(asked)}\r\n\r\n".encode() + asked)
        stream = Stream(connection)
        assert stream.head.startswith(b"HTTP/1.1 200 "), stream.head
        return stream

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect to."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def num_descriptors(self) -> int:
        """What the router has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def forget_peak(self) -> None:
        """From now on ``VmHWM`` of its memory is the peak since then."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def memory_nbytes(self, field: str = "VmRSS") -> int:
        """Of the router alone, engines not counted."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"\n{field}:")[2].split()[0]) * 1024

    def ask_engine(self, path: str, *, post: bool = False) -> Any:
        """Past the router, which lets nobody through to such paths. Of the only engine."""
        (one,) = (one for one in self.node.report().replicas if one.pid)
        assert one.url is not None
        headers = {"Authorization": f"Bearer {one.api_key}"}
        data = b"" if post else None
        return json.loads(ask_engine(one.url, path, data, headers, timeout_s=self.answer_s_max)[2] or b"null")

    def num_ongoing(self) -> int:
        """Requests that engines have, as the router counts them."""
        return sum(one["ongoing"] for one in self.admin("replicas").body["replicas"])

    def said_by_engines(self) -> str:
        """All that engines printed."""
        return "".join(log.read_text() for log in (self.directory / "node" / "logs").glob("*.log"))

    def pids(self, model: str) -> list[int]:
        """Of a model's engines that live."""
        return [one.pid for one in self.node.report().replicas if one.model.endswith(f"/{model}") and one.pid]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=self.answer_s_max) as answer:
                return Answer(answer.status, json.loads(answer.read() or b"null"), _lower(answer.headers.items()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, _content(error), _lower(error.headers.items()))


def _content(error: urllib.error.HTTPError) -> Any:
    """The body of an error: JSON if the router sent it; Ray's proxy sends text if an ingress dies."""
    body = error.read()
    is_text = error.headers.get_content_type() == "text/plain"
    return body.decode() if is_text else json.loads(body or b"null")


def write_config(
    directory: Path, *models: str, slots: int = 2, node_changes: Mapping[str, Any] | None = None, **sections: Any
) -> None:
    """A configuration with fake engines; a model is called as it behaves."""
    values = {
        "server": {"port": 0},
        "node": {
            "slots": slots,
            "memory": "1GiB",
            "warm": False,
            "node_dir": "./node",
            "engine_command": [sys.executable, str(FAKE_ENGINE), "serve"],
            "engine_sockets": True,
            **(node_changes or {}),
        },
        "store": {"directory": "./store"},
        "models": [{"name": name, "source": f"/models/{name}"} for name in models],
        **sections,
    }
    staging = directory / "router.yaml.new"
    staging.write_text(json.dumps(values))  # JSON is YAML
    os.replace(staging, directory / "router.yaml")


@contextmanager
def running_router(
    directory: Path,
    *,
    agent: Mapping[str, Any] | None = None,
    ingress: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    descriptors: int | None = None,
) -> Iterator[RouterUnderTest]:
    """Start one, and end it, if it has not ended. ``agent``, ``ingress``: settings that take the place of its own."""

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(descriptors, 64), descriptors))

    command = [str(Path(sys.executable).with_name("sllm-vllm")), "serve", str(directory / "router.yaml")]
    if agent or ingress:
        limits = (json.dumps(agent or {}), json.dumps(ingress or {}))
        command = [sys.executable, "-c", _WITH_OTHER_LIMITS, str(directory / "router.yaml"), *limits]
    (directory / "store").mkdir(exist_ok=True)
    log = directory / "router.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(**(environment or {})),
            start_new_session=True,
            preexec_fn=limit,
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
            process.wait(DEADLINE_S)
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
