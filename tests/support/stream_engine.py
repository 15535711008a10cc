"""A stand-in for a ready engine that streams to many clients at once: one process, one loop, raw sockets.

``python tests/support/stream_engine.py NAME KEY`` prints its port and ends when its standard input does. What it
answers stands in the request, under ``fake`` (see ``Fake``), or under ``fake`` and its own name, if it alone shall
behave so. Any answer that is JSON holds under ``echo`` what reached it. ``GET /stats`` says what it counted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
import sys
import time
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass, field
from typing import Any

BLOCKED_S = 0.3
BUFFER_NBYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Fake:
    """How an answer is wrong, or large, or slow. Counts are of events; of bytes for a plain answer of ``nbytes``."""

    status: int = 200
    before: str = ""
    """Instead of an answer: ``close``, ``reset``, ``rubbish`` or ``stall``."""
    chunks: int = 3
    pace_s: float = 0.0
    pad: int = 0
    """Bytes more in each event."""
    nbytes: int = 0
    breaks_after: int | None = None
    breaks_how: str = "close"
    stalls_after: int | None = None
    bare: str = ""
    """The body of an answer that is no success."""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Stats:
    """What an engine counts."""

    requests: int = 0
    running: int = 0
    aborted: int = 0
    sent_nbytes: int = 0
    is_blocked: bool = False
    """A reader has taken nothing for a while."""
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


class Left(Exception):
    """The client closed the connection, or the fake does."""


@dataclass
class Engine:
    name: str
    key: str
    stats: Stats = field(default_factory=Stats)

    async def connection(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.stats.connections += 1
        try:
            while request := await read_request(reader):
                await self.answer_while_there(request, reader, writer)
        except (Left, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def answer_while_there(self, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        if request.target == "/stats":
            await send_plain(writer, 200, json.dumps(dataclasses.asdict(self.stats)).encode())
            return
        self.stats.requests += 1
        self.stats.running += 1
        answering = asyncio.create_task(self.answer(request, writer))
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.stats.aborted += 1
                raise Left
            leaving.cancel()
            await asyncio.wait({leaving})
            answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            self.stats.running -= 1

    async def answer(self, request: Request, writer: StreamWriter) -> None:
        if self.key and request.header("authorization") != f"Bearer {self.key}":
            await send_plain(writer, 401, b'{"error":"Unauthorized"}')
            return
        asked = json.loads(request.body) if request.header("content-type").startswith("application/json") else {}
        given = asked.get("fake", {})
        fake = Fake(**given.get(self.name, {} if given.keys() & {"a", "b"} else given))
        await self.misbehave(fake, writer)
        if fake.status != 200:
            body = json.dumps({"error": {"message": "no", "type": "made_up", "param": None, "code": fake.status}})
            await send_plain(writer, fake.status, (fake.bare or body).encode(), fake.headers)
        elif fake.nbytes:
            await self.send_large(fake, writer)
        elif asked.get("stream"):
            await self.stream(fake, asked, writer)
        else:
            await send_plain(writer, 200, json.dumps(self.whole(request, asked)).encode(), fake.headers)

    async def misbehave(self, fake: Fake, writer: StreamWriter) -> None:
        if fake.before == "stall":
            await asyncio.Event().wait()
        if fake.before == "rubbish":
            writer.write(b"this is not HTTP\r\n\r\n")
        if fake.before:
            end(writer, fake.before)

    async def stream(self, fake: Fake, asked: dict[str, Any], writer: StreamWriter) -> None:
        head = [("content-type", "text/event-stream; charset=utf-8"), ("transfer-encoding", "chunked"), *fake.headers]
        writer.write(head_of(200, head))
        tag = str(asked.get("user", ""))
        for number in range(fake.chunks):
            if number == fake.breaks_after:
                await writer.drain()
                end(writer, fake.breaks_how)
            if number == fake.stalls_after:
                await asyncio.Event().wait()
            if fake.pace_s:
                await asyncio.sleep(fake.pace_s)
            await self.send_chunk(b"data: " + self.event(f"{tag}/{number} ", asked, fake.pad) + b"\n\n", writer)
        usage = {"prompt_tokens": 5, "completion_tokens": fake.chunks, "total_tokens": 5 + fake.chunks}
        last = json.dumps({"id": "1", "object": "chat.completion.chunk", "created": 1, "choices": [], "usage": usage})
        await self.send_chunk(b"data: " + last.encode() + b"\n\n", writer)
        await self.send_chunk(b"data: [DONE]\n\n", writer)
        writer.write(b"0\r\n\r\n")

    def event(self, text: str, asked: dict[str, Any], pad: int) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "text": text, "finish_reason": None, "pad": "x" * pad}
        event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": asked.get("model")}
        return json.dumps({**event, "choices": [choice], "t": time.time()}).encode()

    async def send_chunk(self, data: bytes, writer: StreamWriter) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.drain(writer)
        self.stats.sent_nbytes += len(data)

    async def drain(self, writer: StreamWriter) -> None:
        blocked = asyncio.get_running_loop().call_later(BLOCKED_S, setattr, self.stats, "is_blocked", True)
        await writer.drain()
        blocked.cancel()
        self.stats.is_blocked = False

    async def send_large(self, fake: Fake, writer: StreamWriter) -> None:
        writer.write(head_of(200, [("content-type", "application/json"), ("content-length", str(fake.nbytes))]))
        left = fake.nbytes if fake.breaks_after is None else fake.breaks_after
        while left:
            piece = b"y" * min(left, 1 << 16)
            writer.write(piece)
            left -= len(piece)
            await self.drain(writer)
        if fake.breaks_after is not None:
            end(writer, fake.breaks_how)

    def whole(self, request: Request, asked: dict[str, Any]) -> dict[str, Any]:
        text = f" said {self.name}"
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        choice["message"] = {"role": "assistant", "content": text}
        echo = {"target": request.target, "headers": request.headers, "body": request.body.decode("latin-1")}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": asked.get("model"),
            "choices": [choice],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            "echo": {"method": request.method, "engine": self.name, **echo},
        }


async def read_request(reader: StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1")[:-4].split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    request = Request(method, target, headers, b"")
    assert not request.header("transfer-encoding"), "a body that is whole has a length"
    body = await reader.readexactly(int(request.header("content-length") or 0))
    return Request(method, target, headers, body)


def head_of(status: int, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "server: uvicorn", "date: today", "Access-Control-Allow-Origin: *"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers), "", ""]).encode()


async def send_plain(writer: StreamWriter, status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> None:
    head = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers]
    writer.write(head_of(status, head) + body)
    await writer.drain()


def end(writer: StreamWriter, how: str) -> None:
    """Close the connection under the client."""
    if how == "reset":
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Left


async def main(name: str, key: str) -> None:
    engine = Engine(name, key)
    server = await asyncio.start_server(engine.connection, "127.0.0.1", 0, limit=BUFFER_NBYTES, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
