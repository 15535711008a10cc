"""Connections to engines: sends a request and streams its answer. Runs on the ingress's loop.

Plain HTTP/1.1 to an address in this cluster or to a Unix socket on this machine, parsed by httptools, as in uvicorn.
With aiohttp's client instead, 0.2 to 0.7 ms more were added to the median time to first byte at 1 and 16 streams, and
25 to 45 % more processor time.
"""

from __future__ import annotations

import asyncio
import functools
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from sllm_vllm.daemon.unix_listener import HOST, socket_of_url
from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.engine_client.headers import Headers

READ_NBYTES = 1 << 16
"""How far an answer is read ahead of a slow client."""
READ_AT_ONCE_NBYTES = 1 << 14
"""Read from a connection before others have their turn; more would block the loop if hundreds of streams lag behind."""
HEAD_NBYTES_MAX = 1 << 16
IDLE_MAX = 256
"""Idle connections kept per engine."""
KEEP_ALIVE_S = 3.0
"""How long an idle connection is kept: less than vLLM's 5 s."""
CONNECT_S_MAX = 5.0
_URLS_MAX = 1024

CONNECT_AGAIN_S = 0.005
"""Pause between attempts to connect to a Unix socket whose queue of unaccepted connections is full."""

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


class EngineFailed(Exception):
    """The engine can't be reached, or its answer breaks off. Clients may see the message: it names no address.

    ``sign``: what that says about the engine.
    """

    def __init__(self, problem: str, sign: FailureSign = FailureSign.BROKE_OFF) -> None:
        super().__init__(problem)
        self.sign = sign


class Diverted(Exception):
    """The answer continues on another connection; nothing more may be read from this one."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request to send. ``target``: path and query."""

    method: str
    target: str
    headers: Headers
    body: bytes | memoryview


class Upstream:
    """A pool of connections to engines; idle ones are kept for ``keep_alive_s``. ``close`` ends it."""

    def __init__(self, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._keep_alive_s = keep_alive_s
        self._idle: dict[Address, list[EngineConnection]] = {}
        self._is_closed = False

    async def post(
        self,
        url: str,
        *,
        target: str,
        headers: Headers,
        body: bytes | memoryview,
        on_sent: Callable[[EngineConnection], None] | None = None,
    ) -> EngineConnection:
        """Send a request and wait for the head of the answer.

        The engine may just have closed an idle connection, which is no failure: then the request is sent once more, on
        a new connection. ``on_sent`` is called with each connection that the request was sent on.

        Raises:
            EngineFailed: no head came. Diverted: the answer continues elsewhere, see ``EngineConnection.divert``.
        """
        return await self._exchange(_address(url), Sent("POST", target, headers, body), on_sent)

    async def get(self, url: str, *, target: str, headers: Headers) -> EngineConnection:
        """Send a GET and wait for the head of the answer, like ``post``."""
        return await self._exchange(_address(url), Sent("GET", target, headers, b""), None)

    async def _exchange(
        self, address: Address, sent: Sent, on_sent: Callable[[EngineConnection], None] | None
    ) -> EngineConnection:
        idle = self._take_idle(address)
        if idle is not None:
            try:
                return await idle.exchange(sent, on_sent)
            except EngineFailed:
                if not idle.is_silent:
                    raise
            sign = FailureSign.BROKE_OFF  # the engine may have received the request, and may have died of it
        else:
            sign = FailureSign.UNREACHED
        return await (await self._connect(address, sign)).exchange(sent, on_sent)

    def close(self) -> None:
        """Close all idle connections; those in use close when they are given back."""
        self._is_closed = True
        for connections in list(self._idle.values()):
            for connection in list(connections):
                connection.abort()

    def give_back(self, connection: EngineConnection) -> None:
        """Keep a connection for the next request, if it can take one."""
        idle = self._idle.setdefault(connection.address, [])
        if self._is_closed or len(idle) >= IDLE_MAX or not connection.rest(self._keep_alive_s):
            connection.abort()
            if not idle:
                del self._idle[connection.address]
        else:
            idle.append(connection)

    def forget(self, connection: HttpConnection) -> None:
        """Remove a connection that was closed."""
        idle = self._idle.get(connection.address, [])
        if connection in idle:
            idle[:] = [one for one in idle if one is not connection]
            if not idle:
                del self._idle[connection.address]

    def _take_idle(self, address: Address) -> EngineConnection | None:
        """An idle connection that its engine has not closed; None if there is none.

        A request sent on a closed connection would look as if the engine had received it.
        """
        idle = self._idle.pop(address, [])
        while idle:
            connection = idle.pop()
            if connection.is_quiet:
                if idle:
                    self._idle[address] = idle
                connection.wake()
                return connection
            connection.abort()
        return None

    async def _connect(self, address: Address, sign: FailureSign) -> EngineConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                if isinstance(address, str):
                    channel = await _connected(address)
                    _, made = await loop.create_unix_connection(lambda: EngineConnection(self, address), sock=channel)
                else:
                    _, made = await loop.create_connection(lambda: EngineConnection(self, address), *address)
        except OSError as error:  # TimeoutError is one
            raise EngineFailed("it can't be reached", sign) from error
        return made


class HttpConnection(asyncio.BufferedProtocol):
    """One connection: sends requests, and keeps what has arrived of the answer for its reader.

    If the reader is slow, the engine is not read from.
    """

    def __init__(self, pool: Upstream, address: Address) -> None:
        self.address = address
        self.status = 0
        self.headers: Headers = []
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = bytearray(READ_AT_ONCE_NBYTES)
        self._waiter: asyncio.Future[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._failure = ""
        self._pieces: list[bytes] = []
        self._nbytes = 0
        self._head_nbytes = 0
        self._has_head = False
        self._is_complete = True
        self._is_surplus = False
        self._can_stay = False
        self._is_paused = False

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come back for the last request."""
        return not self._has_head and self._head_nbytes == 0

    @property
    def is_quiet(self) -> bool:
        """Whether the socket has nothing unread, not even an EOF that the event loop has not seen yet."""
        if self._transport is None or self._failure:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def _send(self, sent: Sent) -> None:
        if self._transport is None or self._failure:
            raise EngineFailed(self._failure or "it broke off")
        self.status = 0
        self.headers = []
        self._head_nbytes = 0
        self._has_head = self._is_complete = self._can_stay = False
        host = HOST if isinstance(self.address, str) else "{}:{}".format(*self.address)
        body = sent.body
        lines = [f"{sent.method} {sent.target} HTTP/1.1\r\nhost: {host}\r\n".encode()]
        lines += [b"%b: %b\r\n" % header for header in sent.headers]
        lines.append(b"content-length: %d\r\n\r\n" % len(body) if body or sent.method == "POST" else b"\r\n")
        self._transport.write(b"".join([*lines, body]) if len(body) < READ_NBYTES else b"".join(lines))
        if len(body) >= READ_NBYTES:
            self._transport.write(body)

    def _take(self) -> bytes:
        """All that has arrived and was not taken yet."""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._nbytes = 0
        if self._is_paused and self._transport is not None and not self._failure:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def abort(self) -> None:
        """Close the connection at once."""
        self._fail("it was closed")
        if self._transport is not None:
            self._transport.abort()

    def rest(self, idle_s: float) -> bool:
        """Close the connection after ``idle_s``, unless ``wake`` is called before. False if it is closed already."""
        if self._failure:
            return False
        self._idle_timer = self._loop.call_later(idle_s, self.abort)
        return True

    def wake(self) -> None:
        """Use the connection again: it is no longer idle."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, problem: str) -> None:
        self.wake()
        self._pool.forget(self)
        self._failure = self._failure or problem
        self._tell()

    # ------------------------------------------------------------------------------------------ asyncio's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio, see ``asyncio.BufferedProtocol``."""
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        """Called by asyncio, see ``asyncio.BufferedProtocol``."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio, see ``asyncio.BufferedProtocol``."""
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived; anything but an answer to the last request closes the connection."""
        if self._is_complete:
            self.abort()
            return
        if not self._has_head:
            self._head_nbytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("it answers with what is not HTTP")
            self.abort()
            return
        if not self._has_head and self._head_nbytes > HEAD_NBYTES_MAX:
            self._fail("its headers are too large")
            self.abort()
        elif self._nbytes > READ_NBYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        if self._pieces or self._is_complete or self._has_head:
            self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer: one without a length is complete now, any other was cut off."""
        if self._has_head and not self._is_complete and not self._is_framed() and exc is None:
            self._is_complete = True
        self._fail("it broke off")

    def _is_framed(self) -> bool:
        return any(name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers)

    # ---------------------------------------------------------------------------------------- httptools's calls

    def on_message_begin(self) -> None:
        """Begin an answer. A second one was not asked for, and is ignored."""
        if self._is_complete:
            self._is_surplus = True
            self._can_stay = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers are dropped."""
        if not self._has_head and not self._is_surplus:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Complete the head, unless it is that of an interim answer (1xx)."""
        if self._is_surplus:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self.status = status
        self._has_head = True
        self._can_stay = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        if not self._is_surplus:
            self._pieces.append(body)
            self._nbytes += len(body)

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        self._is_complete = self._has_head


class EngineConnection(HttpConnection):
    """A connection with its answer's one reader. Call ``close`` after each answer.

    For a migration the reader can be held, and sent to another engine.
    """

    def __init__(self, pool: Upstream, address: Address) -> None:
        super().__init__(pool, address)
        self._is_held = False
        self._is_diverted = False

    @property
    def is_at_end(self) -> bool:
        """Whether the whole body has been read."""
        return self._is_complete and not self._pieces

    @property
    def is_whole(self) -> bool:
        """Whether the whole answer has arrived, read or not."""
        return self._is_complete

    async def exchange(self, sent: Sent, on_sent: Callable[[EngineConnection], None] | None = None) -> EngineConnection:
        """Send a request and wait for the head of the answer; returns the connection itself.

        Raises:
            EngineFailed: no head came; the connection is closed. Diverted: see ``divert``.
        """
        self._is_held = False
        try:
            self._send(sent)
            if on_sent is not None:
                on_sent(self)
            while not self._is_diverted and (not self._has_head or self._is_waiting_held):
                await self._news()
            self._expect_not_diverted()
        except BaseException:
            self.abort()
            raise
        return self

    async def read(self) -> bytes:
        """The next bytes of the body; empty at its end.

        Raises:
            EngineFailed: the body ended too early. Diverted: see ``divert``.
        """
        while not self._is_diverted and (not self._pieces or self._is_waiting_held):
            if self._is_complete:
                return b""
            await self._news()
        self._expect_not_diverted()
        return self._take()

    def peek(self) -> bytes:
        """What has arrived of the body and has not been read."""
        return b"".join(self._pieces)

    def close(self) -> None:
        """Give the connection back if the whole body was read; else close it, which aborts the request."""
        if self.is_at_end and self._can_stay:
            self._pool.give_back(self)
        else:
            self.abort()

    def hold(self) -> bool:
        """Give the reader nothing until ``release`` or ``divert`` is called, or until the whole answer has arrived.

        After that it is too late for either. False if the answer has arrived already.
        """
        self._is_held = not self._is_complete
        return self._is_held

    def release(self) -> None:
        """Let the reader continue."""
        self._is_held = False
        self._tell()

    def divert(self) -> bool:
        """Raise ``Diverted`` in the reader, now or at its next read. False if the whole answer has arrived already."""
        if not self._is_held or self._is_complete:
            return False
        self._is_diverted = True
        self.release()
        return True

    @property
    def _is_waiting_held(self) -> bool:
        return self._is_held and not self._is_complete

    def _expect_not_diverted(self) -> None:
        if self._is_diverted:
            raise Diverted

    async def _news(self) -> None:
        if self._failure and not self._is_held:
            raise EngineFailed(self._failure)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


@functools.lru_cache(maxsize=_URLS_MAX)
def _address(url: str) -> Address:
    path = socket_of_url(url)
    if path is not None:
        return path
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


async def _connected(path: str) -> socket.socket:
    """Connect to a Unix socket. Retries while its queue is full: Linux refuses at once then, where TCP would wait.

    Raises:
        OSError: nothing listens there.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        while True:
            try:
                channel.connect(path)
                break
            except BlockingIOError:
                await asyncio.sleep(CONNECT_AGAIN_S)
    except BaseException:
        channel.close()
        raise
    return channel
