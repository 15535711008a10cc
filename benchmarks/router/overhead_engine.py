"""A fake engine for measuring the router's overhead: one process with uvloop that streams at a given pace.

It uses next to no processor time. Run it as ``python benchmarks/router/overhead_engine.py serve MODEL --host H --port P
…``, or with ``--uds PATH``. Unknown arguments are ignored, so that a router can start it in place of ``vllm serve``. It
requires no API key. A chat's ``max_tokens`` is the number of pieces in the answer. ``pace_ms=P`` in the last message
sends them P milliseconds apart, the first one at once. The answer is ``answer_of``, so that every stream can be
checked.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import re
import signal
import sys

import httptools
import uvloop

BACKLOG = 2048
MODEL = "overhead"
_PACE = re.compile(r"pace_ms=([0-9.]+)")
_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def answer_of(num_chunks: int) -> str:
    """The text of an answer of ``num_chunks`` pieces."""
    return "".join(_word(number) for number in range(num_chunks))


def _word(number: int) -> str:
    return f"w{number:05d} "


def _event(model: str, delta: dict[str, str], finish: str | None = None) -> bytes:
    """An event as vLLM writes it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    head = {"id": "chatcmpl-8f14e45fceea167a5a36dedd4bea2543", "object": "chat.completion.chunk", "created": 1760000000}
    return b"data: %b\n\n" % json.dumps({**head, "model": model, "choices": [choice]}).encode()


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.cache
def _piece(model: str, number: int) -> bytes:
    role = {"role": "assistant"} if number == 0 else {}
    return _framed(_event(model, {**role, "content": _word(number)}))


@functools.cache
def _end(model: str) -> bytes:
    return _framed(_event(model, {"content": ""}, "stop")) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection; it handles one request at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected: stop streaming."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            assert self._transport is not None
            self._transport.abort()

    def on_message_begin(self) -> None:
        """Called by httptools, as are the next three."""
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        """Collect the request's target."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """Collect a piece of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer the request."""
        if self._parser.get_method() == b"GET":
            models = {"object": "list", "data": [{"id": self._model, "object": "model", "max_model_len": 8192}]}
            self._send_plain(models if self._url.startswith(b"/v1/models") else {})
            return
        asked = json.loads(self._body)
        num_chunks = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 1)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": answer_of(num_chunks)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": num_chunks, "total_tokens": 1 + num_chunks}
            head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": self._model}
            self._send_plain({**head, "choices": [choice], "usage": usage})
            return
        pace = _PACE.search(str(asked["messages"][-1]["content"]))
        self._stream(num_chunks, float(pace[1]) / 1000 if pace else 0.0)

    def _send_plain(self, answer: object) -> None:
        assert self._transport is not None
        body = json.dumps(answer).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _stream(self, num_chunks: int, pace_s: float) -> None:
        assert self._transport is not None
        first = _HEAD + _piece(self._model, 0)
        if not pace_s:
            rest = b"".join(_piece(self._model, number) for number in range(1, num_chunks))
            self._transport.write(first + rest + _end(self._model))
            return
        self._transport.write(first)
        self._schedule(1, num_chunks, began_s=self._loop.time(), pace_s=pace_s)

    def _schedule(self, number: int, num_chunks: int, *, began_s: float, pace_s: float) -> None:
        """Schedule a piece relative to the stream's begin, not to the last piece, so that delays don't add up."""
        due_s = began_s + number * pace_s
        self._timer = self._loop.call_at(due_s, self._next, number, num_chunks, began_s, pace_s)

    def _next(self, number: int, num_chunks: int, began_s: float, pace_s: float) -> None:  # noqa: PLR0917 - a callback
        if self._transport is None:
            return
        if number == num_chunks:
            self._transport.write(_end(self._model))
        else:
            self._transport.write(_piece(self._model, number))
            self._schedule(number + 1, num_chunks, began_s=began_s, pace_s=pace_s)


async def serve(model: str, address: tuple[str, int] | str) -> None:
    """Serve until SIGTERM, at a host and port or at the path of a Unix socket."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    if isinstance(address, str):
        server = await loop.create_unix_server(lambda: Connection(model), address, backlog=BACKLOG)
    else:
        server = await loop.create_server(lambda: Connection(model), *address, backlog=BACKLOG)
    await stopped.wait()
    server.close()


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int)
    where.add_argument("--uds")
    parser.add_argument("--served-model-name", default=MODEL)
    given, _ = parser.parse_known_args(arguments)
    uvloop.run(serve(given.served_model_name, given.uds or (given.host, given.port)))


if __name__ == "__main__":
    main(sys.argv[1:])
