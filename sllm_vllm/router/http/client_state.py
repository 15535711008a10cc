"""What the kernel knows about a client's connection: whether the client reads its answer, and whether it has left.

Owned by one connection of ``limits.py``. ``ClientCounts`` belongs to the server, for ``/metrics``.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from collections.abc import Callable

logger = logging.getLogger(__name__)

LOG_PAUSE_S = 10.0
"""Pause between two log lines about refused connections."""
_CHECKS = 4
"""How often a client's progress is checked within its time limit."""
_PROBE_S = 0.05
_PROBE_S_MAX = 5.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TCP_CLOSE = 7
"""The state of a connection that its peer has reset, in Linux's include/net/tcp_states.h."""


class ClientCounts:
    """Counts the connections that are open, and those that the server has refused or ended since it started."""

    def __init__(self) -> None:
        self.num_open = 0
        self.num_refused = 0
        self.num_slow = 0
        self._num_logged = 0
        self._logged_at_s: float | None = None

    def refuse(self, connections_max: int, now_s: float) -> None:
        """Count a connection beyond the maximum. Logs at most one line per ``LOG_PAUSE_S``, with the number since."""
        self.num_refused += 1
        if self._logged_at_s is not None and now_s - self._logged_at_s < LOG_PAUSE_S:
            return
        logger.warning(
            "event=connections_refused num=%d connections_max=%d", self.num_refused - self._num_logged, connections_max
        )
        self._num_logged = self.num_refused
        self._logged_at_s = now_s


class SlowClient:
    """Ends a connection whose client has taken nothing for ``limit_s`` while bytes wait for it.

    Args:
        end: called once, with the number of bytes that wait.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        limit_s: float,
        *,
        loop: asyncio.AbstractEventLoop,
        end: Callable[[int], None],
    ) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._loop = loop
        self._end = end
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._since_s = 0.0

    def begin(self) -> None:
        """Start watching: bytes wait for the client."""
        if self._timer is None:
            self._unsent = num_unsent(self._transport)
            self._since_s = self._loop.time()
            self._check_later()

    def stop(self) -> None:
        """Stop watching: no bytes wait, or the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_later(self) -> None:
        self._timer = self._loop.call_later(self._limit_s / _CHECKS, self._check)

    def _check(self) -> None:
        self._timer = None
        unsent = num_unsent(self._transport)
        if unsent != self._unsent:  # an increase is progress, too: more is written only after the client took some
            self._unsent = unsent
            self._since_s = self._loop.time()
        if not unsent:
            return
        if self._loop.time() - self._since_s >= self._limit_s:
            self._end(unsent)
        else:
            self._check_later()


class HalfClosed:
    """Distinguishes a client that has only closed its sending side from one that has left: both send a FIN.

    A client that has closed its socket replies to any data with a reset. So until the answer begins, the client is sent
    interim ``100 Continue`` responses, which every HTTP/1.1 client has to skip (RFC 9110, 15.2).

    Args:
        end: called once the client is known to have left.
    """

    def __init__(
        self, transport: asyncio.Transport, *, loop: asyncio.AbstractEventLoop, end: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._end = end
        self._pause_s = _PROBE_S
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, may_interrupt: Callable[[], bool]) -> None:
        """Check now, and then at growing intervals. ``may_interrupt``: whether an interim response is allowed now."""
        self._timer = None
        if self._transport.is_closing():
            return
        if has_reset(self._transport):
            self._end()
            return
        if may_interrupt():
            self._transport.write(_CONTINUE)
        self._timer = self._loop.call_later(self._pause_s, self.watch, may_interrupt)
        self._pause_s = min(2 * self._pause_s, _PROBE_S_MAX)

    def stop(self) -> None:
        """Stop checking: the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def num_unsent(transport: asyncio.Transport) -> int:
    """Return the bytes that the client's machine has not acknowledged, including those buffered in this process."""
    connection = transport.get_extra_info("socket")
    queued = bytearray(4)
    try:
        fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, queued)
    except OSError:  # the connection has ended
        return 0
    return transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])


def has_reset(transport: asyncio.Transport) -> bool:
    """Whether the client has reset the connection; True, too, if the kernel can't tell."""
    connection = transport.get_extra_info("socket")
    try:
        return bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)
    except OSError:
        return True
