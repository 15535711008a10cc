"""The client that measures the router's overhead: many streams at once over raw sockets, each timed and checked.

``python -m benchmarks.router.overhead_client`` reads a ``Load`` as a line of JSON, connects, prints ``{"at":
"ready"}``, waits for a line, and runs. It prints ``{"at": "open"}`` when every stream has its first event, and its
``Found`` at the end. It is a process of its own, so that its cost is the same with any target. Answers are checked
after the load has ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop
from pydantic import BaseModel

STREAM_S_MAX = 60.0
FAULTS_SHOWN_MAX = 5
SPREAD_S_MAX = 1.0
"""Longest period over which the first streams begin."""
OPEN_AT_ONCE = 256
"""Where each place has only one stream, this many streams begin per ``SPREAD_S_MAX``."""


class Load(BaseModel):
    """A load: which requests to send, and where. Each of the ``streams`` places runs one stream at a time.

    ``seconds``: how long new streams begin; with 0, each place has one stream. ``text``: what each answer must be;
    None: only the number of tokens is checked, by the engine's own count.
    """

    host: str
    port: int
    model: str
    key: str
    streams: int
    chunks: int
    pace_ms: float
    seconds: float
    text: str | None
    seed: int = 0

    @property
    def body(self) -> bytes:
        """The body of each request."""
        message = {"role": "user", "content": f"Count. pace_ms={self.pace_ms:g}"}
        asked: dict[str, Any] = {"model": self.model, "messages": [message], "max_tokens": self.chunks, "stream": True}
        if self.text is None:
            asked |= {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()


class Found(BaseModel):
    """The results of a load. ``firsts_ms``: from sending a request to the first byte of the answer's body. ``chunks``:
    events with text.

    ``faults``: what was wrong with answers; empty if every stream was right.
    """

    at: str = "end"
    firsts_ms: list[float]
    chunks: int
    nbytes: int
    seconds: float
    faults: list[str]


@dataclass(slots=True)
class Answer:
    """One stream as it was received."""

    status: int = 0
    first_ms: float = 0.0
    pieces: list[bytes] = field(default_factory=list)
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """What an answer contains."""

    text: str
    chunks: int
    completion_tokens: int | None
    is_done: bool


class Connection(asyncio.Protocol):
    """One connection; it handles one answer at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._answer = Answer()
        self._ended: asyncio.Future[None] | None = None
        self.on_first: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for the end of its answer."""
        assert self._transport is not None
        self._answer, self._ended = Answer(), self._loop.create_future()
        self._sent_s = time.perf_counter()
        self._transport.write(request)
        try:
            async with asyncio.timeout(STREAM_S_MAX):
                await self._ended
        except TimeoutError:
            self._answer.fault = f"no end after {STREAM_S_MAX:.0f} s"
            self._transport.abort()
        return self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """End an incomplete answer with a fault."""
        self._transport = None
        self._end("the connection was closed before the end")

    def on_body(self, body: bytes) -> None:
        """Called by httptools."""
        if not self._answer.pieces:
            self._answer.first_ms = (time.perf_counter() - self._sent_s) * 1000
            if self.on_first is not None:
                self.on_first()
        self._answer.pieces.append(body)

    def on_message_complete(self) -> None:
        """Complete the answer."""
        self._answer.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._end("")

    def _end(self, fault: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._answer.fault = fault
            self._ended.set_result(None)


class Client:
    """Runs a load. Places are independent: each begins its next stream a random moment after its last one has ended."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answers: list[Answer] = []
        self._num_open = 0
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {load.host}:{load.port}\r\naccept: */*\r\n"
        head += (
            f"authorization: Bearer {load.key}\r\ncontent-type: application/json\r\ncontent-length: {len(load.body)}"
        )
        self._request = f"{head}\r\n\r\n".encode() + load.body

    async def connect(self) -> list[Connection]:
        """Open a connection for each place."""
        return [await self._connect() for _ in range(self._load.streams)]

    async def run(self, connections: list[Connection]) -> Found:
        """Run the load and return the results."""
        began_s = time.perf_counter()
        await asyncio.gather(*(self._place(nth, connection) for nth, connection in enumerate(connections)))
        return self._found(time.perf_counter() - began_s)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, self._load.host, self._load.port)
        return made

    async def _place(self, nth: int, connection: Connection) -> None:
        """Run the streams of one place, one after another. Begins are spread, else all would arrive at once."""
        chance = random.Random(f"{self._load.seed}/{nth}")
        pace_s = self._load.pace_ms / 1000
        spread_s = SPREAD_S_MAX if self._load.seconds else SPREAD_S_MAX * self._load.streams / OPEN_AT_ONCE
        spread_s = min(self._load.chunks * pace_s, spread_s)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._load.seconds
        await asyncio.sleep(spread_s * nth / self._load.streams)
        while True:
            if not connection.is_open:
                connection = await self._connect()
            connection.on_first = self._note_first
            self._answers.append(answer := await connection.ask(self._request))
            if loop.time() >= end_s or answer.fault:
                return
            await asyncio.sleep(chance.random() * pace_s)

    def _note_first(self) -> None:
        self._num_open += 1
        if self._num_open == self._load.streams:
            print(json.dumps({"at": "open"}), flush=True)

    def _found(self, seconds: float) -> Found:
        reads = [read_events(b"".join(answer.pieces)) for answer in self._answers]
        faults = [
            fault for answer, read in zip(self._answers, reads, strict=True) if (fault := self._fault(answer, read))
        ]
        return Found(
            firsts_ms=[answer.first_ms for answer in self._answers],
            chunks=sum(read.chunks for read in reads),
            nbytes=sum(len(read.text) for read in reads),
            seconds=seconds,
            faults=faults[:FAULTS_SHOWN_MAX],
        )

    def _fault(self, answer: Answer, read: Read) -> str:
        """What is wrong with an answer; empty if it is right."""
        if answer.fault or answer.status != 200:
            return f"status {answer.status}: {answer.fault or b''.join(answer.pieces)[:300].decode(errors='replace')}"
        return fault_of(read, self._load)


def fault_of(read: Read, load: Load) -> str:
    """What is wrong with a completely received answer; empty if it is right."""
    if not read.is_done:
        return "there is no [DONE]"
    if load.text is None:
        is_right = read.completion_tokens == load.chunks
        return "" if is_right else f"{read.completion_tokens} tokens, not {load.chunks}"
    if (read.chunks, len(read.text)) != (load.chunks, len(load.text)):
        return f"{read.chunks} chunks of {len(read.text)} bytes, not {load.chunks} of {len(load.text)}"
    return "" if read.text == load.text else "the text is another"


def read_events(body: bytes) -> Read:
    """Parse the events of a chat stream."""
    text, chunks, tokens, is_done = "", 0, None, False
    for event in body.split(b"\n\n"):
        data = event.strip().removeprefix(b"data:").strip()
        is_done = is_done or data == b"[DONE]"
        if not data.startswith(b"{"):
            continue
        told = json.loads(data)
        said = "".join(choice.get("delta", {}).get("content") or "" for choice in told.get("choices", []))
        text += said
        chunks += bool(said)
        if told.get("usage"):
            tokens = told["usage"]["completion_tokens"]
    return Read(text, chunks, tokens, is_done)


async def main() -> None:
    """Run the protocol that the module's docstring describes."""
    client = Client(Load.model_validate_json(sys.stdin.readline()))
    connections = await client.connect()
    print(json.dumps({"at": "ready"}), flush=True)
    sys.stdin.readline()
    print((await client.run(connections)).model_dump_json(), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
