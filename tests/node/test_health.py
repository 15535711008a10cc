"""Whether an engine is well: a real client, and a real server that says, or does not say, what the test wants."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import aiohttp
import pytest
import uvloop

from sllm_vllm.daemon.unix_listener import url_of_socket
from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.engine import ask_health, http_base, keep_asking, session_to, wait_healthy
from sllm_vllm.node.ports import Ports
from sllm_vllm.node.protocol import ReplicaOrder
from sllm_vllm.node.running_time import within
from tests.support.commands import command
from tests.support.waiting import DEADLINE_S, wait_until

FAKE_ENGINE = Path(__file__).parents[1] / "support" / "fake_engine.py"
SHORT_S = 0.1


class Engine:
    """A server whose answers are in ``answers``, the last one for ever; None: it never answers."""

    def __init__(self) -> None:
        self.answers: list[bytes | None] = [b"200 OK"]
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer is None:
                await reader.read()  # until the other side hangs up
            elif answer:
                writer.write(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture(params=["port", "socket"])
async def at(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Engine, str]]:
    """A server, and its URL."""
    engine = Engine()
    if request.param == "socket":
        async with await asyncio.start_unix_server(engine.serve, tmp_path / "a socket"):
            yield engine, url_of_socket(tmp_path / "a socket")
    else:
        async with await asyncio.start_server(engine.serve, "127.0.0.1", 0) as server:
            yield engine, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def engine(at: tuple[Engine, str]) -> tuple[Engine, str]:
    """The same with the URL that it has in the session."""
    return at[0], http_base(at[1])


@pytest.fixture
async def client(request: pytest.FixtureRequest) -> AsyncIterator[aiohttp.ClientSession]:
    """Of the test's engine, or of any port."""
    url = request.getfixturevalue("at")[1] if "at" in request.fixturenames else "http://127.0.0.1:1"
    async with session_to(url) as session:
        yield session


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"200 OK", ""),
        (b"503 Service Unavailable", "it answered with status 503"),
        (b"404 Not Found", "it answered with status 404"),
        (b"204 No Content", "it answered with status 204"),
        (None, "no answer within 0.1 s"),
    ],
)
async def test_only_status_200_is_well(
    engine: tuple[Engine, str], client: aiohttp.ClientSession, answer: bytes | None, problem: str
) -> None:
    engine[0].answers = [answer]
    answer_s = SHORT_S if answer is None else DEADLINE_S
    assert await ask_health(client, engine[1], answer_s=answer_s) == problem
    assert engine[0].requests in ([b"GET /health HTTP/1.1"], [])


@pytest.mark.parametrize("answer", [b"", b"nonsense"])
async def test_one_that_hangs_up_or_talks_nonsense_is_not_well(
    engine: tuple[Engine, str], client: aiohttp.ClientSession, answer: bytes
) -> None:
    engine[0].answers = [answer]
    assert await ask_health(client, engine[1], answer_s=DEADLINE_S) != ""


async def test_one_that_does_not_listen_is_not_well(client: aiohttp.ClientSession) -> None:
    with Ports().reserve() as port:
        problem = await ask_health(client, f"http://127.0.0.1:{port.port}", answer_s=DEADLINE_S)
    assert problem is not None
    assert "Cannot connect" in problem


async def test_a_socket_that_is_not_there_or_not_listened_to_is_not_well(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    async with session_to(url_of_socket(path)) as client:
        assert "Cannot connect" in (await ask_health(client, "http://localhost", answer_s=DEADLINE_S) or "")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            assert "Cannot connect" in (await ask_health(client, "http://localhost", answer_s=DEADLINE_S) or "")


def test_a_socket_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    """Linux refuses one connection too many at once, where it has a TCP connection wait."""

    async def work() -> None:
        path = tmp_path / "engine"
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
            server.bind(str(path))
            server.listen(0)
            first.connect(str(path))
            async with session_to(url_of_socket(path)) as client:
                assert await ask_health(client, "http://localhost", answer_s=SHORT_S) == "no answer within 0.1 s"
                asked = asyncio.create_task(ask_health(client, "http://localhost", answer_s=DEADLINE_S))
                server.accept()[0].close()
                made, _ = await asyncio.to_thread(server.accept)
                with made:
                    await asyncio.to_thread(made.recv, 4096)
                    made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                assert await asked == ""

    uvloop.run(work())  # as the router's


async def test_the_first_yes_is_waited_for(engine: tuple[Engine, str], client: aiohttp.ClientSession) -> None:
    engine[0].answers = [b"503 Busy", None, b"", b"200 OK"]
    async with asyncio.timeout(DEADLINE_S):
        await wait_healthy(client, engine[1], answer_s=1)
    assert len(engine[0].requests) == 4


async def test_it_is_asked_again_and_again(engine: tuple[Engine, str], client: aiohttp.ClientSession) -> None:
    engine[0].answers = [b"503 Busy", b"200 OK", b"500 Oh"]
    answers: asyncio.Queue[str] = asyncio.Queue()
    asking = asyncio.create_task(keep_asking(client, engine[1], answers.put_nowait, every_s=0.5))
    async with asyncio.timeout(DEADLINE_S):
        got = [await answers.get() for _ in range(3)]
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert got == ["it answered with status 503", "", "it answered with status 500"]


# --------------------------------------------------------------------------------- by an agent that itself stands still


class Well(BaseHTTPRequestHandler):
    """Answers at once, from a thread that the loop's stalls do not touch."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


async def test_time_in_which_the_loop_was_blocked_is_not_the_engines(client: aiohttp.ClientSession) -> None:
    with HTTPServer(("127.0.0.1", 0), Well) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        loop, answers = asyncio.get_running_loop(), []
        for _ in range(3):
            loop.call_soon(lambda: loop.call_soon(time.sleep, 2.0))
            answers.append(await ask_health(client, f"http://127.0.0.1:{server.server_port}", answer_s=1.0))
        await asyncio.to_thread(server.shutdown)
    assert answers == [""] * 3


async def test_a_question_that_there_is_no_descriptor_for_was_not_asked(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(**kwargs: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("aiohappyeyeballs.impl.socket.socket", no_socket)
    assert await ask_health(client, "http://127.0.0.1:1", answer_s=DEADLINE_S) is None


async def test_what_takes_too_long_on_a_loop_that_runs_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        await within(0.3, work())
    assert cancelled.is_set()


def test_an_engine_is_not_ended_because_its_agent_was_stopped(tmp_path: Path) -> None:
    """By a signal, while a question was under way, for longer than an answer may take."""
    client, health_s = NodeClient(tmp_path / "node" / "socket", timeout_s=DEADLINE_S), 2.0
    engine_command = [sys.executable, str(FAKE_ENGINE), "serve"]
    config = tmp_path / "node.json"
    config.write_text(json.dumps({"engine_command": engine_command, "health_s": health_s, "unwell_max": 1}))
    folders = ("--node-dir", str(tmp_path / "node"), "--store-dir", str(tmp_path), "--config", str(config))
    serve = command("node", "serve", "--slots", "1", "--memory", "1GiB", "--no-warm", *folders)
    with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as agent:
        try:
            wait_until(client.is_there, "the agent")
            replica = client.order(ReplicaOrder(model="/models/fine")).id
            wait_until(lambda: client.replica(replica).is_ready, "the engine")
            pid, port = client.replica(replica).pid, client.replica(replica).port
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: is_connected_to(port), "a question")
            os.kill(agent.pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            end_s = time.monotonic() + health_s + 1.0
            wait_until(lambda: time.monotonic() > end_s, "the time of an answer to pass")
            os.kill(agent.pid, signal.SIGCONT)
            told = client.replica(replica)
            end_s = time.monotonic() + health_s
            wait_until(lambda: time.monotonic() > end_s, "the next question")
            assert (told.state, client.replica(replica).state, client.replica(replica).pid) == ("ready", "ready", pid)
        finally:
            agent.send_signal(signal.SIGCONT)
            agent.terminate()


def is_connected_to(port: int | None) -> bool:
    """Whether somebody has a connection to a port of this machine."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(line[2].endswith(f":{port:04X}") and line[3] == "01" for line in lines)
