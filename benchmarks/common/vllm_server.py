"""Runs a stock ``vllm serve`` as a child: starts it, sends requests, stops it. Owns its process group and log."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sllm_vllm.config import child_environment

HOST = "127.0.0.1"
START_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
LOG_LINES_SHOWN = 30
MODEL_NAME = "demo"
"""Name of the model in requests."""
LOADING_MARK = "Starting to load model"
"""What vLLM's model runners log before they load a model."""

_POLL_S = 0.05
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default a start fills nine tenths of the memory with zeros
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerFailed(Exception):
    """The server died, did not become healthy in time, or refused a request. The message is written for the user."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of one completion, and when the first of them arrived (``time.monotonic``)."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    first_token_s: float


def vllm_command() -> Path:
    """The ``vllm`` command of this Python's environment."""
    return Path(sys.executable).parent / "vllm"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """One server, as a context manager that starts it and ends all processes of its group.

    Args:
        arguments: arguments of ``vllm serve``, after the model.
        environment: added to this process's environment.
        log: file for its output.
        command: starts vLLM's command line; default ``vllm``.
        without: variables to remove from its environment, including those that every server here gets.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        command: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        self.log = log
        self._port = free_port()
        self._command = [
            *(command or [str(vllm_command())]),
            "serve",
            str(model),
            "--host",
            HOST,
            "--port",
            str(self._port),
        ]
        self._command += ["--served-model-name", MODEL_NAME, *arguments]
        whole = child_environment(**_ENVIRONMENT, **environment)
        self._environment = {name: value for name, value in whole.items() if name not in without}
        self._process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0
        """When the server was started (``time.monotonic``)."""

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.start_s = time.monotonic()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        process = self._process
        assert process is not None
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        _signal(process.pid, signal.SIGTERM)
        while _group_lives(process) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if _group_lives(process):
            _signal(process.pid, signal.SIGKILL)
        process.wait()

    @property
    def port(self) -> int:
        """The port on which the server listens, or will listen."""
        return self._port

    @property
    def pid(self) -> int:
        """Process id of its first process, which leads a session."""
        assert self._process is not None
        return self._process.pid

    def check_alive(self) -> None:
        """Check that the server has not ended.

        Raises:
            ServerFailed: it has ended.
        """
        self._check_alive(0)

    def wait_loading(self) -> None:
        """Wait until the server is about to load the model, or has loaded it.

        Raises:
            ServerFailed: see ``wait_healthy``.
        """
        self._wait(lambda: LOADING_MARK in self.log.read_text(errors="replace") or self._is_healthy())

    def wait_healthy(self) -> None:
        """Wait until ``/health`` reports healthy.

        Raises:
            ServerFailed: the process ended before, or it took longer than ``START_TIMEOUT_S``.
        """
        self._wait(self._is_healthy)

    def complete(self, question: Mapping[str, Any]) -> Completion:
        """Request one completion, streamed, with token ids.

        Raises:
            ServerFailed: the server refused, broke off, or took longer than ``REQUEST_TIMEOUT_S``.
        """
        try:
            return stream_completion(self._port, question)
        except ServerFailed:
            self._check_alive(0)
            raise

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])

    def _wait(self, is_so: Callable[[], bool]) -> None:
        while time.monotonic() - self.start_s < START_TIMEOUT_S:
            self._check_alive(_POLL_S)
            if is_so():
                return
        raise ServerFailed(f"it was not healthy after {START_TIMEOUT_S:.0f} s")

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return _request(self._port, "/health", timeout_s=5.0).status == http.client.OK
        return False

    def _check_alive(self, patience_s: float) -> None:
        """Wait up to ``patience_s`` and raise if the process has ended by then."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=patience_s)
            raise ServerFailed(f"it ended with status {code}")


def stream_completion(port: int, question: Mapping[str, Any], *, api_key: str = "") -> Completion:
    """Request one completion, streamed, with token ids, from the vLLM server on a port of this machine.

    Raises:
        ServerFailed: the server refused, broke off, or took longer than ``REQUEST_TIMEOUT_S``.
    """
    body = json.dumps({"model": MODEL_NAME, "stream": True, "return_token_ids": True, **question})
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    prompt: list[int] = []
    tokens: list[int] = []
    first_token_s = 0.0
    try:
        response = _request(port, "/v1/completions", body, headers=headers, timeout_s=REQUEST_TIMEOUT_S)
        for choice in _choices(response):
            prompt += choice.get("prompt_token_ids") or []
            tokens += choice.get("token_ids") or []
            if tokens and not first_token_s:
                first_token_s = time.monotonic()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerFailed(f"a completion failed: {error}") from None
    return Completion(tuple(prompt), tuple(tokens), first_token_s)


def _request(
    port: int, path: str, body: str | None = None, *, headers: Mapping[str, str] | None = None, timeout_s: float
) -> http.client.HTTPResponse:
    """Send a GET, or a POST if there is a body."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    method = "GET" if body is None else "POST"
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    return connection.getresponse()


def _choices(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The choices in a stream of server-sent events, which must end with ``[DONE]``."""
    if response.status != http.client.OK:
        raise ValueError(f"status {response.status}: {response.read(500).decode(errors='replace')}")
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"]))
            yield from event["choices"]
    raise ValueError("the stream broke off")


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of its group is left. Ended orphans are reaped by the process that adopted them."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
