"""The agent's socket: routes, refusals, limits, and who is heard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm_vllm.daemon.unix_listener import open_channel
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointMissing,
    ConfigError,
    DiskFull,
    RemoteMissing,
    ReplicaUnknown,
    SllmError,
    StoreRefused,
)
from sllm_vllm.node.protocol import REQUEST_NBYTES_MAX
from sllm_vllm.node.server import CONNECTIONS_MAX
from tests.support.cases import every_case
from tests.support.fake_agent import KEY, ServedAgent, agent_process
from tests.support.waiting import wait_until

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedAgent]:
    with ServedAgent(tmp_path / "node") as served:
        yield served


def send(served: ServedAgent, request: bytes) -> bytes:
    """Everything that comes back for these very bytes."""
    channel, _, _ = open_channel(served.socket, 30.0)
    answer = b""
    with channel, contextlib.suppress(ConnectionError):
        channel.sendall(request)
        while data := channel.recv(1 << 16):
            answer += data
    return answer


def ask(served: ServedAgent, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """Status and parsed body of an answer of known length."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = send(served, head.encode() + body)
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(rest)


def test_socket_and_folder_are_for_this_user_alone(served: ServedAgent) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.socket.parent.stat().st_mode) == 0o700


def test_order_is_answered_with_the_replica(served: ServedAgent) -> None:
    order = {"model": "m/slow", "arguments": ["--dtype", "float32"], "id": "a", "environment": {"K": "v"}}
    status, report = ask(served, "POST", "/v1/replicas", json.dumps(order).encode())
    assert (status, report["id"], report["model"], report["api_key"]) == (201, "a", "m/slow", KEY)
    assert served.agent.orders[0].arguments == ("--dtype", "float32")
    assert served.agent.orders[0].environment == {"K": "v"}


@every_case(
    "method, path, expected",
    [
        ("GET", "/v1/replicas/slow-1", {"id": "slow-1", "state": "loading"}),
        ("DELETE", "/v1/replicas/slow-1", {"id": "slow-1", "state": "stopping"}),
        ("GET", "/v1/report", {"version": "1.2.3", "warm": {"pss_nbytes": None}}),
        ("GET", "/v1/report?memory=0", {"version": "1.2.3", "warm": {"pss_nbytes": None}}),
        ("GET", "/v1/report?memory=1", {"version": "1.2.3", "warm": {"pss_nbytes": 5 << 20}}),
        ("GET", "/v1/replicas/sl/story", {"story": ["-1.000 s  ReplicaOrdered slow-1", "-0.500 s  StartEngine"]}),
    ],
)
def test_route(served: ServedAgent, method: str, path: str, expected: dict[str, Any]) -> None:
    served.order("slow", id="slow-1")
    wait_until(lambda: served.client.replica("slow-1").state == "loading", "the start")
    status, answer = ask(served, method, path)
    assert status == 200
    for key, value in expected.items():
        assert (answer[key] | value if isinstance(value, dict) else value) == answer[key]


def test_prefetch_and_stop_are_handed_on(served: ServedAgent) -> None:
    assert ask(served, "POST", "/v1/prefetch", b'{"checkpoint": "c"}') == (200, {})
    assert served.agent.prefetched == ["c"]
    assert ask(served, "POST", "/v1/stop") == (202, {})
    assert served.was_told_to_stop.is_set()


@every_case("prefix", ["alpha-1", "al", "a"])
def test_a_unique_prefix_is_enough(served: ServedAgent, prefix: str) -> None:
    served.order("slow", id="alpha-1")
    served.order("slow", id="beta-1")
    assert ask(served, "GET", f"/v1/replicas/{prefix}")[1]["id"] == "alpha-1"


def test_streams_end_with_the_replica(served: ServedAgent) -> None:
    served.order("ready", id="r")
    wait_until(lambda: served.client.replica("r").is_ready, "the replica")
    served.client.stop_replica("r")
    whole = send(served, b"GET /v1/replicas/r/watch HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b'"state":"stopped"' in whole
    assert whole.endswith(b"0\r\n\r\n")
    logs = send(served, b"GET /v1/replicas/r/logs?follow=1&tail=7 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"\r\nline 2\n\r\n" in logs


# ----------------------------------------------------------------------------------------------------------- refusals


@every_case(
    "method, path, body, status, kind, names",
    [
        ("GET", "/v1/replicas/none", b"", 404, "ReplicaUnknown", "none"),
        ("DELETE", "/v1/replicas/none", b"", 404, "ReplicaUnknown", "none"),
        ("GET", "/v1/replicas/none/watch", b"", 404, "ReplicaUnknown", "none"),
        ("GET", "/v1/replicas/none/logs", b"", 404, "ReplicaUnknown", "none"),
        ("GET", "/v1/replicas/none/story", b"", 404, "ReplicaUnknown", "none"),
        ("POST", "/v1/replicas", b'{"model": "m/refused"}', 409, "OrderRefused", "m/refused"),
        ("POST", "/v1/prefetch", b'{"checkpoint": "no-store"}', 503, "StoreUnavailable", "/store/socket"),
        ("POST", "/v1/replicas", b"", 400, "NodeError", "body"),
        ("POST", "/v1/replicas", b"{", 400, "NodeError", "body"),
        ("POST", "/v1/replicas", b"\xff\xfe", 400, "NodeError", "body"),
        ("POST", "/v1/replicas", b"[]", 400, "NodeError", "body"),
        ("POST", "/v1/replicas", b"{}", 400, "NodeError", "model"),
        ("POST", "/v1/replicas", b'{"model": ""}', 400, "NodeError", "model"),
        ("POST", "/v1/replicas", b'{"model": "m", "port": -1}', 400, "NodeError", "port"),
        ("POST", "/v1/replicas", b'{"model": "m", "arguments": [1]}', 400, "NodeError", "arguments.0"),
        ("POST", "/v1/replicas", b'{"model": "m", "directory": "x"}', 400, "NodeError", "directory"),
        ("POST", "/v1/replicas", b'{"model": "m", "id": "../x"}', 400, "NodeError", "id"),
        ("POST", "/v1/replicas", b'{"model": "m", "colour": 1}', 400, "NodeError", "colour"),
        ("POST", "/v1/prefetch", b'{"checkpoint": 1}', 400, "NodeError", "checkpoint"),
        ("GET", "/v1/report?memory=yes", b"", 400, "NodeError", "memory"),
        ("GET", "/v1/replicas/slow-1/logs?tail=-1", b"", 400, "NodeError", "tail"),
        ("GET", "/v1/replicas/slow-1/logs?tail=99999999999999", b"", 400, "NodeError", "tail"),
        ("GET", "/v1/replicas/slow-1/logs?follow=2", b"", 400, "NodeError", "follow"),
        ("GET", "/v2/report", b"", 404, "NodeError", "/v2/report"),
        ("PUT", "/v1/report", b"", 405, "NodeError", "/v1/report"),
    ],
)
def test_refusal(served: ServedAgent, method: str, path: str, body: bytes, status: int, kind: str, names: str) -> None:
    served.order("slow", id="slow-1")
    found, answer = ask(served, method, path, body)
    error = answer["error"]
    assert (found, error["kind"], error["path"]) == (status, kind, names)
    assert error["problem"]
    assert error["mend"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointMissing("c", "p", "m"), 404),
        (CheckpointCorrupt("c", "p", "m"), 422),
        (StoreRefused("s", "p", "m"), 502),
        (RemoteMissing("r", "p", "m"), 502),
        (DiskFull("d", "p", "m"), 500),
        (ConfigError("wrong"), 400),
        (ReplicaUnknown("x", "p", "m"), 404),
    ],
    ids=lambda value: type(value).__name__,
)
def test_status_of_an_error(
    served: ServedAgent, monkeypatch: pytest.MonkeyPatch, error: SllmError, status: int
) -> None:
    async def prefetch(checkpoint: str) -> None:
        raise error

    monkeypatch.setattr(served.agent, "prefetch", prefetch)
    found, answer = ask(served, "POST", "/v1/prefetch", b'{"checkpoint": "c"}')
    assert (found, answer["error"]["kind"]) == (status, type(error).__name__)
    assert answer["error"]["problem"] == getattr(error, "problem", "wrong")


def test_several_of_a_prefix_are_unknown(served: ServedAgent) -> None:
    served.order("slow", id="a-1")
    served.order("slow", id="a-2")
    assert ask(served, "GET", "/v1/replicas/a-")[0] == 404


def test_a_mistake_of_the_agent_ends_nothing(served: ServedAgent) -> None:
    answer = send(
        served,
        b'POST /v1/replicas HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 19\r\n\r\n{"model": "unsaid"}',
    )
    assert b" 500 " in answer.splitlines()[0]
    assert ask(served, "GET", "/v1/report")[0] == 200


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_body_that_is_too_long(served: ServedAgent) -> None:
    body = b'{"model": "' + b"x" * REQUEST_NBYTES_MAX + b'"}'
    status, answer = ask(served, "POST", "/v1/replicas", body)
    assert (status, answer["error"]["path"]) == (413, "body")
    assert served.agent.orders == []


def test_a_body_of_the_largest_size(served: ServedAgent) -> None:
    body = b'{"model": "slow"}'.ljust(REQUEST_NBYTES_MAX)
    assert ask(served, "POST", "/v1/replicas", body)[0] == 201


def test_an_endless_head_is_not_read(served: ServedAgent) -> None:
    answer = send(served, b"GET /v1/report HTTP/1.1\r\nX: " + b"y" * (1 << 20))
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400")) or answer == b""
    assert ask(served, "GET", "/v1/report")[0] == 200


def test_more_clients_than_allowed_are_hung_up_on(served: ServedAgent) -> None:
    served.order("slow", id="s")
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            stack.enter_context(open_channel(served.socket, 30.0)[0])
        extra = stack.enter_context(open_channel(served.socket, 30.0)[0])
        with contextlib.suppress(ConnectionError):
            extra.sendall(b"GET /v1/report HTTP/1.1\r\nHost: x\r\n\r\n")
            assert extra.recv(4096) == b""
    wait_until(lambda: send(served, b"GET /v1/report HTTP/1.0\r\n\r\n"), "a place to be free")


def test_garbage_ends_the_connection_and_nothing_else(served: ServedAgent) -> None:
    line = st.sampled_from([b"GET /v1/report HTTP/1.1\r\n", b"POST /v1/replicas HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n"])
    field = st.sampled_from([b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"{}", b'{"model": "slow"}'])

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(line, field, st.binary(max_size=64)), max_size=8))
    def feed(parts: list[bytes]) -> None:
        channel, _, _ = open_channel(served.socket, 30.0)
        with channel, contextlib.suppress(ConnectionError):
            channel.sendall(b"".join(parts))
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(1 << 16):
                pass

    feed()
    assert ask(served, "GET", "/v1/report")[0] == 200


@pytest.mark.parametrize("what", ["watch", "logs?follow=1"])
def test_a_client_that_leaves_ends_its_stream(served: ServedAgent, what: str) -> None:
    served.order("slow", id="s")
    wait_until(lambda: served.client.replica("s").state == "loading", "the start")
    channel, _, _ = open_channel(served.socket, 30.0)
    with channel:
        channel.sendall(f"GET /v1/replicas/s/{what} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert channel.recv(1 << 16)
        wait_until(lambda: served.agent.num_streams == 1, "the stream to begin")
    wait_until(lambda: served.agent.num_streams == 0, "the stream to end")


# ------------------------------------------------------------------------------------------------------- who is heard


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@as_root
def test_another_user_is_turned_away_even_where_the_modes_are_open(open_folder: Path) -> None:
    with agent_process(open_folder / "node") as (client, _):
        for path in (client.socket_path, client.socket_path.parent):
            path.chmod(0o777)
        os.seteuid(NOBODY)
        try:
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(str(client.socket_path))
        finally:
            os.seteuid(0)
        with channel, contextlib.suppress(ConnectionError):
            channel.sendall(b"GET /v1/report HTTP/1.1\r\nHost: x\r\n\r\n")
            assert channel.recv(4096) == b""
        assert client.report().version == "1.2.3"


def test_no_key_in_the_log(served: ServedAgent, caplog: pytest.LogCaptureFixture) -> None:
    secret = "hf-also-secret"
    with caplog.at_level(logging.DEBUG):
        arguments = ("--api-key", secret)
        served.order("slow", id="s", environment={"HF_TOKEN": secret}, arguments=arguments)
        body = json.dumps({"model": "m", "environment": {"HF_TOKEN": [secret]}, "arguments": secret}).encode()
        assert secret not in json.dumps(ask(served, "POST", "/v1/replicas", body))
        ask(served, "GET", "/v1/report")
        served.client.stop_replica("s")
    assert "event=order_accepted replica=s" in caplog.text
    assert not re.search(f"{secret}|{KEY}", caplog.text)
