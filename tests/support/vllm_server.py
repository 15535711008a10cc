"""A real `vllm serve` for tests: on a free port of the loopback, asked over HTTP, ended with its whole group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_MAX_S = 400.0
REQUEST_MAX_S = 200.0
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}


class ServerFailed(Exception):
    """The server ended, or was not healthy in time; the message ends with its log's last lines."""


@dataclass(frozen=True, slots=True)
class Server:
    """A healthy server. ``log`` is the file that gets everything it prints."""

    port: int
    model: str
    log: Path

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON, return JSON (None for an empty answer); raises `urllib.error.HTTPError` for an error status."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_MAX_S) as answer:
            raw = answer.read()
        return json.loads(raw) if raw else None

    def tokens(self, prompt: str, **sampling: Any) -> list[int]:
        """Token ids of one completion."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 24, "return_token_ids": True, **sampling}
        answer: list[int] = self.post("/v1/completions", body)["choices"][0]["token_ids"]
        return answer


@contextlib.contextmanager
def vllm_server(
    model: Path, directory: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Run `vllm serve MODEL …arguments`; yields once it is healthy and ends it, and all it started, afterwards.

    Args:
        directory: gets the log.
    """
    port, log = _free_port(), directory / f"vllm-{time.monotonic_ns()}.log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enforce-eager", "--max-model-len", "256", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SERVER_ENVIRONMENT, **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait_healthy(process, port, log)
        yield Server(port, str(model), log)
    finally:
        _end_group(process)


def _wait_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_MAX_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise ServerFailed(f"vllm serve ended with {process.returncode}\n{_tail(log)}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    raise ServerFailed(f"vllm serve was not healthy after {START_MAX_S:.0f} s\n{_tail(log)}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
