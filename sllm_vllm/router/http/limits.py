"""uvicorn's httptools protocol with the limits it lacks: size and time of a request's head, number of connections,
pipelining, clients that do not read.

A second request that arrives before the first is answered is dropped, and the connection closes after the first
answer: otherwise uvicorn would no longer notice that the client left. Trailers are dropped; uvicorn would treat them
as headers. A request that offers another protocol (``Upgrade: h2c``) is answered in HTTP/1.1, as RFC 9110, 7.8,
allows. A client may close its sending side of the connection after its request.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.engine_client.headers import values_of
from sllm_vllm.router.http.client_state import ClientCounts, HalfClosed, SlowClient
from sllm_vllm.router.http.deadline import SLOW
from sllm_vllm.router.http.errors import ApiError

logger = logging.getLogger(__name__)

_HEADER_NBYTES = len(": \r\n")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def limited_protocol(settings: IngressSettings, counts: ClientCounts) -> type[LimitedProtocol]:
    """The protocol class to give to uvicorn, which creates the instances."""
    return type("_Protocol", (LimitedProtocol,), {"settings": settings, "counts": counts})


class LimitedProtocol(HttpToolsProtocol):
    """One client's connection. ``settings`` and ``counts`` are set on a subclass."""

    settings: IngressSettings
    counts: ClientCounts

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._is_in_head = True
        self._is_surplus = False
        self._head_nbytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_head_repeated = False
        self._slow: SlowClient | None = None
        self._half_closed: HalfClosed | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close the connection if there are too many."""
        super().connection_made(transport)
        self.counts.num_open = len(self.connections)
        if len(self.connections) > self.settings.connections_max:
            self.counts.refuse(self.settings.connections_max, self.loop.time())
            transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers and update the count."""
        self._stop_timer()
        if self._slow is not None:
            self._slow.stop()
        if self._half_closed is not None:
            self._half_closed.stop()
        super().connection_lost(exc)
        self.counts.num_open = len(self.connections)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a half-closed connection for the answer to a complete request; close any other.

        A client that closes its side after its answer has begun has left: if it only half-closed, it would have done so
        with its request.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_started or cycle.more_body:
            return False
        cycle.keep_alive = False
        may_be_interrupted = self.scope["http_version"] == "1.1"
        self._half_closed = HalfClosed(self.transport, loop=self.loop, end=self.transport.abort)
        self._half_closed.watch(lambda: may_be_interrupted and not cycle.response_started)
        return True

    def pause_writing(self) -> None:
        """Start to watch a client that reads more slowly than its answer arrives."""
        super().pause_writing()
        self._watch_slow()

    def resume_writing(self) -> None:
        """Stop watching: the client has read most of what was waiting."""
        super().resume_writing()
        if self._slow is not None:
            self._slow.stop()

    def on_response_complete(self) -> None:
        """As in uvicorn, but a closing connection with unsent bytes is ended if its client stops reading."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_slow()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one with unsent bytes stays open as long as its client keeps reading."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._watch_slow()

    def data_received(self, data: bytes) -> None:
        """Parse, and limit the size of an incomplete head. ``on_headers_complete`` checks a complete one."""
        if self._is_surplus or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._is_in_head:
            self._head_nbytes += len(data)
            if self._head_nbytes > self.settings.head_nbytes_max:
                self._refuse(431, "The headers are too large.")

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._is_surplus:
                self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the body that follows. The parser stops after the head; a new one gets a head with the same framing."""
        if self.parser.get_method() == b"CONNECT":  # what follows is not HTTP
            self._is_surplus = True
            self.cycle.keep_alive = False
            super().on_message_complete()
            return
        framing = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] in _FRAMING)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
        self._is_head_repeated = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        if rest:
            self._parse(rest)

    def on_message_begin(self) -> None:
        """Start the head's timer; mark a pipelined request to be dropped."""
        if self._is_head_repeated:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_surplus = True
            self.cycle.keep_alive = False
            return
        self._is_in_head = True
        self._head_nbytes = 0
        self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """As in uvicorn, unless the request is dropped."""
        if not self._is_surplus and not self._is_head_repeated:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """As in uvicorn, unless it is a trailer or the request is dropped."""
        if self._is_in_head and not self._is_surplus and not self._is_head_repeated:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Admit the request if its head is small enough and names one host at most."""
        if self._is_surplus:
            return
        if self._is_head_repeated:
            self._is_head_repeated = False
            return
        self._is_in_head = False
        self._stop_timer()
        if len(values_of(self.headers, b"host")) > 1:  # RFC 9112, 3.2: proxies and servers differ in which one they use
            self._is_surplus = True
            self._refuse(400, "The request has more than one Host header.")
            return
        nbytes = len(self.url) + sum(len(name) + len(value) + _HEADER_NBYTES for name, value in self.headers)
        if nbytes > self.settings.head_nbytes_max:
            self._is_surplus = True
            self._refuse(431, "The headers are too large.")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As in uvicorn, unless the request is dropped."""
        if not self._is_surplus:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """As in uvicorn, unless the request is dropped, or its body is still to be read."""
        if not self._is_surplus and not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 to what is not HTTP. If an answer is already being sent, only close the connection."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse(400, "The request is not HTTP as it should be.")

    def _watch_slow(self) -> None:
        if self._slow is None:
            limit_s = self.settings.slow_client_timeout
            self._slow = SlowClient(self.transport, limit_s, loop=self.loop, end=self._end_slow)
        self._slow.begin()

    def _end_slow(self, num_unsent: int) -> None:
        self.counts.num_slow += 1
        path = ""
        if self.scope is not None:
            self.scope[SLOW] = True  # type: ignore[literal-required]
            path = self.scope["path"]
        logger.warning("event=slow_client_ended client=%s path=%r unsent=%d", self.client, path[:200], num_unsent)
        self.transport.abort()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.settings.head_s_max, self._end_wait)

    def _end_wait(self) -> None:
        # A client that has sent nothing gets no 408: it would take it for the answer to its next request.
        if self._head_nbytes:
            self._refuse(408, "The headers took too long.")
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = ApiError(status, message).body
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, _PHRASES[status], len(body)) + body)
        self.transport.close()
