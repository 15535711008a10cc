"""Connections to engines: one request out, its answer in, as it comes. Lives on the ingress's loop.

Plain HTTP/1.1 to an address of this cluster, or to a Unix socket of this machine, parsed by httptools (as uvicorn's
side is). aiohttp's client in its place added 0.2 to 0.7 ms more to the median first byte at 1 and 16 streams, and 25 to
45 % more processor time.
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

from sllm_vllm.router.core.facts import FailureSign
from sllm_vllm.router.headers import Headers
from sllm_vllm.router.settings import IngressSettings
from sllm_vllm.socket_url import HOST, socket_of_url

READ_NBYTES = 1 << 16
"""What is read ahead of a client that is slow."""
READ_AT_ONCE_NBYTES = 1 << 14
"""Taken from a connection before others have their turn: hundreds of streams that are behind would hold up the loop."""
HEAD_NBYTES_MAX = 1 << 16
IDLE_MAX = 256
"""Idle connections kept to one engine."""
_URLS_MAX = 1024

CONNECT_AGAIN_S = 0.005
"""Between attempts at a Unix socket whose engine has not accepted what came before."""

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


class EngineFailed(Exception):
    """The engine can't be reached, or breaks off. The message is fit for a client: it names no address.

    ``sign``: what that says about the engine.
    """

    def __init__(self, problem: str, sign: FailureSign = FailureSign.BROKE_OFF) -> None:
        super().__init__(problem)
        self.sign = sign


class Diverted(Exception):
    """The answer goes on elsewhere; nothing more is to be read here."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request. ``target``: path and query."""

    method: str
    target: str
    headers: Headers
    body: bytes | memoryview


class Upstream:
    """A pool of connections. ``close`` ends it."""

    def __init__(self, settings: IngressSettings) -> None:
        self._settings = settings
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

        A connection that was idle may just have been closed by the engine, which says nothing against it: then the
        request goes out once more, on a new one. ``on_sent`` is told of each.

        Raises:
            EngineFailed: there is none. Diverted: nobody waits for it any more.
        """
        return await self._exchange(_address(url), Sent("POST", target, headers, body), on_sent)

    async def get(self, url: str, *, target: str, headers: Headers) -> EngineConnection:
        """The same for a GET."""
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
            sign = FailureSign.BROKE_OFF  # the engine may have got it, and may have ended of it
        else:
            sign = FailureSign.UNREACHED
        return await (await self._connect(address, sign)).exchange(sent, on_sent)

    def close(self) -> None:
        """Close every idle connection; those in use close when they are given back."""
        self._is_closed = True
        for connections in list(self._idle.values()):
            for connection in list(connections):
                connection.abort()

    def give_back(self, connection: EngineConnection) -> None:
        """Keep it for the next request, if it can have one."""
        idle = self._idle.setdefault(connection.address, [])
        if self._is_closed or len(idle) >= IDLE_MAX or not connection.rest(self._settings.engine_keep_alive_s):
            connection.abort()
            if not idle:
                del self._idle[connection.address]
        else:
            idle.append(connection)

    def forget(self, connection: EngineConnection) -> None:
        """It was closed."""
        idle = self._idle.get(connection.address, [])
        if connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.address]

    def _take_idle(self, address: Address) -> EngineConnection | None:
        """One that its engine has not closed, if any: a request sent into a closed one would look swallowed."""
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
            async with asyncio.timeout(self._settings.connect_s_max):
                if isinstance(address, str):
                    channel = await _connected(address)
                    _, made = await loop.create_unix_connection(lambda: EngineConnection(self, address), sock=channel)
                else:
                    _, made = await loop.create_connection(lambda: EngineConnection(self, address), *address)
        except OSError as error:  # TimeoutError is one
            raise EngineFailed("it can't be reached", sign) from error
        return made


class EngineConnection(asyncio.BufferedProtocol):
    """One connection, and the answer that is read from it. ``close`` after each answer."""

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
        self._is_held = False
        self._is_diverted = False

    @property
    def is_silent(self) -> bool:
        """Whether nothing at all came back for the last request."""
        return not self._has_head and self._head_nbytes == 0

    @property
    def is_quiet(self) -> bool:
        """Whether the socket holds nothing unread, not even its end, which the event loop may not have seen yet."""
        if self._transport is None or self._failure:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    @property
    def is_at_end(self) -> bool:
        """Whether the whole body was read."""
        return self._is_complete and not self._pieces

    async def exchange(self, sent: Sent, on_sent: Callable[[EngineConnection], None] | None = None) -> EngineConnection:
        """Send a request and wait for the head of the answer; returns itself.

        Raises:
            EngineFailed: there is none; the connection is closed. Diverted: see ``divert``.
        """
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

    def _send(self, sent: Sent) -> None:
        if self._transport is None or self._failure:
            raise EngineFailed(self._failure or "it broke off")
        self.status = 0
        self.headers = []
        self._head_nbytes = 0
        self._has_head = self._is_complete = self._can_stay = self._is_held = False
        host = HOST if isinstance(self.address, str) else "{}:{}".format(*self.address)
        body = sent.body
        lines = [f"{sent.method} {sent.target} HTTP/1.1\r\nhost: {host}\r\n".encode()]
        lines += [b"%b: %b\r\n" % header for header in sent.headers]
        lines.append(b"content-length: %d\r\n\r\n" % len(body) if body or sent.method == "POST" else b"\r\n")
        self._transport.write(b"".join([*lines, body]) if len(body) < READ_NBYTES else b"".join(lines))
        if len(body) >= READ_NBYTES:
            self._transport.write(body)

    async def read(self) -> bytes:
        """What there is of the body, at least a byte; empty at its end.

        Raises:
            EngineFailed: it ended too early. Diverted: see ``divert``.
        """
        while not self._is_diverted and (not self._pieces or self._is_waiting_held):
            if self._is_complete:
                return b""
            await self._news()
        self._expect_not_diverted()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._nbytes = 0
        if self._is_paused and self._transport is not None and not self._failure:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """Give the connection back if the whole body was read; else end it, which aborts the request."""
        if self.is_at_end and self._can_stay:
            self._pool.give_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self._fail("it was closed")
        if self._transport is not None:
            self._transport.abort()

    def rest(self, idle_s: float) -> bool:
        """Close after some time, unless ``wake`` comes before. Whether there is still a connection."""
        if self._failure:
            return False
        self._idle_timer = self._loop.call_later(idle_s, self.abort)
        return True

    def wake(self) -> None:
        """It is needed again."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    # ------------------------------------------------------------------------------------------------ live migration

    def hold(self) -> bool:
        """From now on nothing is given to the reader, until ``release`` or ``divert``, or the answer is whole: then it
        is too late for both. False if it is whole already."""
        self._is_held = not self._is_complete
        return self._is_held

    def release(self) -> None:
        """Go on."""
        self._is_held = False
        self._tell()

    def divert(self) -> bool:
        """Have the reader, who waits or will, get ``Diverted``; False if it has gone on: the answer is whole."""
        if not self._is_held or self._is_complete:
            return False
        self._is_diverted = True
        self.release()
        return True

    @property
    def is_whole(self) -> bool:
        """Whether the whole answer has come, read or not."""
        return self._is_complete

    def peek(self) -> bytes:
        """What has come of the body and was not read."""
        return b"".join(self._pieces)

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
        """As asyncio has it."""
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        """As asyncio has it."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """As asyncio has it."""
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parse; anything but an answer to what was asked ends the connection."""
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
        """An answer without a length ends so; any other was cut."""
        if self._has_head and not self._is_complete and not self._is_framed() and exc is None:
            self._is_complete = True
        self._fail("it broke off")

    def _is_framed(self) -> bool:
        return any(name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers)

    # ---------------------------------------------------------------------------------------- httptools's calls

    def on_message_begin(self) -> None:
        """An answer begins; a second one was not asked for, and nothing of it is read."""
        if self._is_complete:
            self._is_surplus = True
            self._can_stay = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are dropped."""
        if not self._has_head and not self._is_surplus:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is there, unless it is an interim one."""
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
        """A piece of the body."""
        if not self._is_surplus:
            self._pieces.append(body)
            self._nbytes += len(body)

    def on_message_complete(self) -> None:
        """The end of the body."""
        self._is_complete = self._has_head


@functools.lru_cache(maxsize=_URLS_MAX)
def _address(url: str) -> Address:
    path = socket_of_url(url)
    if path is not None:
        return path
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


async def _connected(path: str) -> socket.socket:
    """A connection to a Unix socket. While its queue is full Linux refuses at once, where TCP would wait.

    Raises:
        OSError: no one listens there.
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
