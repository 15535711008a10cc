"""uvicorn's httptools protocol with the limits it lacks: size and time of a request's head, connections, pipelining.

A second request that arrives before the first is answered is dropped, and the connection closes after the answer:
uvicorn would not notice any more that the first one's client left. Trailers are dropped; uvicorn would take them for
headers.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sllm_vllm.router.openai_errors import ApiError
from sllm_vllm.router.settings import IngressSettings

_HEADER_NBYTES = len(": \r\n")
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def limited_protocol(settings: IngressSettings) -> type[LimitedProtocol]:
    """The class to give to uvicorn, which makes its instances itself."""
    return type("_Protocol", (LimitedProtocol,), {"settings": settings})


class LimitedProtocol(HttpToolsProtocol):
    """One connection of a client. ``settings`` is set on a subclass."""

    settings: IngressSettings

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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hang up on one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections_max:
            transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete yet; what is complete is measured below."""
        if self._is_surplus or self.transport.is_closing():
            return
        super().data_received(data)
        if self._is_in_head:
            self._head_nbytes += len(data)
            if self._head_nbytes > self.settings.head_nbytes_max:
                self._refuse(431, "The headers are too large.")

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_surplus = True
            self.cycle.keep_alive = False
            return
        self._is_in_head = True
        self._head_nbytes = 0
        self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """As uvicorn does, unless the request is dropped."""
        if not self._is_surplus:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn does, unless it is a trailer."""
        if self._is_in_head and not self._is_surplus:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the request in if its head is small enough."""
        if self._is_surplus:
            return
        self._is_in_head = False
        self._stop_timer()
        nbytes = len(self.url) + sum(len(name) + len(value) + _HEADER_NBYTES for name, value in self.headers)
        if nbytes > self.settings.head_nbytes_max:
            self._is_surplus = True
            self._refuse(431, "The headers are too large.")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As uvicorn does, unless the request is dropped."""
        if not self._is_surplus:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """As uvicorn does, unless the request is dropped."""
        if not self._is_surplus:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP. An answer that is under way is not written into: the connection just ends."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse(400, "The request is not HTTP as it should be.")

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.settings.head_s_max, self._end_wait)

    def _end_wait(self) -> None:
        # Who has asked nothing yet would take an answer for one to what it asks next.
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
