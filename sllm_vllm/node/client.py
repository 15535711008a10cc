"""Client of a node agent's socket: blocking, one connection for each request. Used by the commands.

It avoids aiohttp, whose import would cost a command more than its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, ValidationError

from sllm_vllm.config import REPLY_NBYTES_MAX
from sllm_vllm.daemon.unix_listener import is_trusted, open_channel
from sllm_vllm.errors import NodeBusy, NodeError, NodeUnavailable, OrderRefused, ReplicaUnknown
from sllm_vllm.node.protocol import NAME_PATTERN, NodeReport, ReplicaOrder, ReplicaReport

MEND_UNAVAILABLE = "start one with `sllm-vllm node serve` or `sllm-vllm run`"
PROBLEM_DIED = "the agent ended in the middle"
MEND_DIED = "see agent.log beside the socket"
MEND_ODD = "restart the agent: it may be of another version"
TIMEOUT_S = 30.0
"""Longest wait for an answer that does not depend on an engine."""
SILENT_S = 10.0
"""In an answer without a time limit, check after this much silence that the agent still answers at all."""
_PING = "/v1/ping"
"""A path that no agent serves: any answer to it, an error included, shows that the agent answers."""
_READ_NBYTES = 1 << 16
_CONNECT_POLL_S = 0.05

KINDS: Mapping[str, type[NodeError]] = {
    kind.__name__: kind for kind in (NodeBusy, NodeUnavailable, OrderRefused, ReplicaUnknown)
}
Message = TypeVar("Message", bound=BaseModel)


class NodeClient:
    """The agent behind a socket. Holds no connection between calls.

    Every method raises ``NodeUnavailable`` if no agent answers or it ends before its answer is complete, the agent's
    own errors (``OrderRefused``, ``ReplicaUnknown``), and ``NodeError`` for anything else. An id may be given by a
    unique prefix.

    An answer must arrive within ``timeout_s``. One that depends on an engine may be silent for any time, but after each
    ``silent_s`` of silence the agent must answer another request within ``timeout_s``.
    """

    def __init__(self, socket_path: Path, *, timeout_s: float = TIMEOUT_S, silent_s: float = SILENT_S) -> None:
        self.socket_path = socket_path
        self._timeout_s = timeout_s
        self._silent_s = silent_s
        self._has_answered = False
        """If the agent can't be reached after this is set, it has ended meanwhile."""

    def is_there(self) -> bool:
        """Whether an agent accepts connections."""
        try:
            self._connection(self._timeout_s).close()
        except NodeUnavailable:
            return False
        return True

    def report(self, *, with_memory: bool = False) -> NodeReport:
        """The state of the whole node."""
        return self._ask("GET", f"/v1/report?memory={int(with_memory)}", NodeReport)

    def order(self, order: ReplicaOrder) -> ReplicaReport:
        """Order a replica; returns once the order is accepted."""
        return self._ask("POST", "/v1/replicas", ReplicaReport, body=order.model_dump_json().encode())

    def replica(self, replica_id: str) -> ReplicaReport:
        """The replica's current report."""
        return self._ask("GET", self._path_of(replica_id), ReplicaReport)

    def stop_replica(self, replica_id: str) -> ReplicaReport:
        """Ask a replica to end; ``watch`` shows when it has ended."""
        return self._ask("DELETE", self._path_of(replica_id), ReplicaReport)

    def watch(self, replica_id: str) -> Generator[ReplicaReport, None, None]:
        """Yield a replica's report now, at every change, and often while it starts, until it has ended."""
        rest = b""
        for data in self._stream(f"{self._path_of(replica_id)}/watch"):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > REPLY_NBYTES_MAX:
                raise self._odd("a report without end")
            for line in lines:
                yield self._parsed(ReplicaReport, line)

    def logs(
        self, replica_id: str, *, tail_nbytes: int | None = None, follow: bool = False
    ) -> Generator[bytes, None, None]:
        """A replica's output, from its last ``tail_nbytes`` on; with ``follow``, until it has ended."""
        query = {"follow": int(follow)} | ({} if tail_nbytes is None else {"tail": tail_nbytes})
        return self._stream(f"{self._path_of(replica_id)}/logs?{urlencode(query)}")

    def story(self, replica_id: str) -> list[str]:
        """The last events and actions of a replica."""
        told = self._json("GET", f"{self._path_of(replica_id)}/story").get("story")
        if not isinstance(told, list):
            raise self._odd("no story in its answer")
        return [str(line) for line in told]

    def prefetch(self, checkpoint: str) -> None:
        """Have a checkpoint read into the store's memory; returns once the agent has answered."""
        body = json.dumps({"checkpoint": checkpoint}).encode()
        connection = self._patient_connection()
        with contextlib.closing(connection), self._death_told():
            self._object(self._checked(self._sent(connection, "POST", "/v1/prefetch", body=body)))

    def stop(self, *, wait_s: float | None = None) -> None:
        """End the agent and all its engines. Waits up to ``wait_s`` until its process is gone; None: does not wait.

        Raises:
            NodeError: it still runs after ``wait_s``.
        """
        connection = self._connection(self._timeout_s)
        with contextlib.closing(connection), contextlib.ExitStack() as stack:
            process = -1
            with contextlib.suppress(ProcessLookupError, OSError):  # a process in another container has no pid here
                process = os.pidfd_open(connection.peer_pid)
                stack.callback(os.close, process)
            with self._death_told():
                self._checked(self._sent(connection, "POST", "/v1/stop"))
            if wait_s is not None and not self._is_gone(process, wait_s):
                raise NodeError(self.socket_path, f"the agent is still running after {wait_s:g} s", MEND_DIED)

    def _is_gone(self, process: int, wait_s: float) -> bool:
        if process >= 0:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            return bool(poll.poll(wait_s * 1e3))
        deadline = time.monotonic() + wait_s
        while self.is_there():
            if time.monotonic() > deadline:
                return False
            time.sleep(_CONNECT_POLL_S)
        return True

    def _path_of(self, replica_id: str) -> str:
        if not re.fullmatch(NAME_PATTERN, replica_id):
            raise ReplicaUnknown(replica_id, "this is not a valid replica id", "see `sllm-vllm ps --all`")
        return f"/v1/replicas/{replica_id}"

    def _ask(self, method: str, path: str, kind: type[Message], *, body: bytes | None = None) -> Message:
        connection = self._connection(self._timeout_s)
        with contextlib.closing(connection), self._death_told():
            return self._parsed(kind, self._checked(self._sent(connection, method, path, body=body)))

    def _json(self, method: str, path: str) -> dict[str, Any]:
        connection = self._connection(self._timeout_s)
        with contextlib.closing(connection), self._death_told():
            return self._object(self._checked(self._sent(connection, method, path)))

    def _stream(self, path: str) -> Generator[bytes, None, None]:
        """Yield a body as it arrives. No time limit: an engine may be silent for hours."""
        connection = self._patient_connection()
        with contextlib.closing(connection), self._death_told():
            response = self._sent(connection, "GET", path)
            if response.status != 200:
                self._checked(response)
            while data := response.read1(_READ_NBYTES):
                yield data

    def _patient_connection(self) -> _UnixConnection:
        """A connection whose reads wait as long as the agent lives."""
        connection = self._connection(self._timeout_s)
        connection.be_patient(self._silent_s, self._require_answer)
        return connection

    def _require_answer(self) -> None:
        """Raise NodeUnavailable if the agent does not answer at all."""
        connection = self._connection(self._timeout_s)
        with contextlib.closing(connection), self._death_told():
            self._sent(connection, "GET", _PING).read(REPLY_NBYTES_MAX)

    def _connection(self, timeout_s: float | None) -> _UnixConnection:
        connection = _UnixConnection(self.socket_path, timeout_s)
        try:
            connection.connect()
        except OSError as error:
            if self._has_answered:
                raise NodeUnavailable(self.socket_path, PROBLEM_DIED, MEND_DIED) from None
            said = error.strerror or str(error)
            raise NodeUnavailable(self.socket_path, f"no agent is running ({said})", MEND_UNAVAILABLE) from None
        if not is_trusted(connection.peer_uid):
            connection.close()
            problem = f"it belongs to user {connection.peer_uid}"
            raise NodeError(self.socket_path, problem, "give a --node-dir of your own")
        return connection

    @contextlib.contextmanager
    def _death_told(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            problem = "the agent does not answer"
        except (OSError, HTTPException):
            problem = PROBLEM_DIED
        else:
            return
        raise NodeUnavailable(self.socket_path, problem, MEND_DIED)

    def _sent(self, connection: _UnixConnection, method: str, path: str, *, body: bytes | None = None) -> HTTPResponse:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        with contextlib.suppress(BrokenPipeError):  # refused before it was sent whole: the answer says why
            connection.request(method, path, body=body, headers={**kind, "Connection": "close"})
        response = connection.getresponse()
        self._has_answered = True
        return response

    def _checked(self, response: HTTPResponse) -> bytes:
        """The whole body of a successful answer; an error that the agent sent is raised."""
        data = response.read(REPLY_NBYTES_MAX + 1)
        if len(data) > REPLY_NBYTES_MAX:
            raise self._odd("an answer that is too long")
        if response.length:  # http.client takes a truncated body for a whole one
            raise IncompleteRead(data, response.length)
        if 200 <= response.status < 300:
            return data
        try:
            told = json.loads(data)["error"]
            kind, said = KINDS.get(told["kind"], NodeError), [str(told[key]) for key in ("path", "problem", "mend")]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._odd(f"HTTP status {response.status}") from None
        raise kind(*said)

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            raise self._odd("no JSON") from None
        if not isinstance(told, dict):
            raise self._odd("no JSON object")
        return told

    def _parsed(self, kind: type[Message], data: bytes) -> Message:
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise self._odd(f"no {kind.__name__} ({field}: {first['msg']})") from None

    def _odd(self, what: str) -> NodeError:
        return NodeError(self.socket_path, f"the agent sent {what}", MEND_ODD)


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket; ``peer_pid`` is 0 if the peer is in another container."""

    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._timeout_s = timeout_s
        self.sock: socket.socket | None = None
        self.peer_pid = 0
        self.peer_uid = -1

    def connect(self) -> None:
        """Connect; the caller decides whether to trust the peer."""
        self.sock, self.peer_pid, self.peer_uid = open_channel(self._path, self._timeout_s)

    def be_patient(self, silent_s: float, ask: Callable[[], None]) -> None:
        """Read without a time limit; call ``ask`` after each ``silent_s`` in which nothing arrived."""
        assert self.sock is not None, "connect first"
        self.sock = _PatientSocket(self.sock, silent_s, ask)


class _PatientSocket(socket.socket):
    """A socket whose reads wait without a limit and call ``ask`` now and then. A timeout of the socket itself would not
    do: after it has expired, the response can't be read any further."""

    def __init__(self, plain: socket.socket, silent_s: float, ask: Callable[[], None]) -> None:
        super().__init__(fileno=plain.detach())
        self.settimeout(None)
        self._silent_s = silent_s
        self._ask = ask

    def recv_into(self, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - as socket has it
        """Read as soon as there is data."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        while not poll.poll(self._silent_s * 1e3):
            self._ask()
        return super().recv_into(*args, **kwargs)
