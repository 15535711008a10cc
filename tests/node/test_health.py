"""Whether an engine is well: a real client, and a real server that says, or does not say, what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from sllm_vllm.node.health import ask_health, keep_asking, wait_healthy
from sllm_vllm.node.ports import Ports

TIMEOUT_S = 60
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


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    """A server, and its URL."""
    engine = Engine()
    async with await asyncio.start_server(engine.serve, "127.0.0.1", 0) as server:
        yield engine, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
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
    answer_s = SHORT_S if answer is None else TIMEOUT_S
    assert await ask_health(client, engine[1], answer_s=answer_s) == problem
    assert engine[0].requests in ([b"GET /health HTTP/1.1"], [])


@pytest.mark.parametrize("answer", [b"", b"nonsense"])
async def test_one_that_hangs_up_or_talks_nonsense_is_not_well(
    engine: tuple[Engine, str], client: aiohttp.ClientSession, answer: bytes
) -> None:
    engine[0].answers = [answer]
    assert await ask_health(client, engine[1], answer_s=TIMEOUT_S) != ""


async def test_one_that_does_not_listen_is_not_well(client: aiohttp.ClientSession) -> None:
    with Ports().reserve() as port:
        problem = await ask_health(client, f"http://127.0.0.1:{port.port}", answer_s=TIMEOUT_S)
    assert "Cannot connect" in problem


async def test_the_first_yes_is_waited_for(engine: tuple[Engine, str], client: aiohttp.ClientSession) -> None:
    engine[0].answers = [b"503 Busy", None, b"", b"200 OK"]
    async with asyncio.timeout(TIMEOUT_S):
        await wait_healthy(client, engine[1], answer_s=1)
    assert len(engine[0].requests) == 4


async def test_it_is_asked_again_and_again(engine: tuple[Engine, str], client: aiohttp.ClientSession) -> None:
    engine[0].answers = [b"503 Busy", b"200 OK", b"500 Oh"]
    answers: asyncio.Queue[str] = asyncio.Queue()
    asking = asyncio.create_task(keep_asking(client, engine[1], answers.put_nowait, every_s=0.5))
    async with asyncio.timeout(TIMEOUT_S):
        got = [await answers.get() for _ in range(3)]
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert got == ["it answered with status 503", "", "it answered with status 500"]
