"""Ports of engines, from the order until they end: held by a socket that never listens.

An engine binds its port itself, seconds after it was chosen. Until then the agent's socket keeps it: on Linux sockets
that all have ``SO_REUSEADDR`` may be bound to one port as long as none listens, and one of them may then listen, while
the system gives the port to nobody who asks for any port, and to no outgoing connection. Nor does a connection of the
port's last user that the system still remembers (``TIME_WAIT``) keep it from being reserved.
"""

from __future__ import annotations

import errno
import os
import socket
from types import TracebackType

from sllm_vllm.node.core.launch import LOOPBACK, Place


class PortReservation:
    """A port of an address that nobody else gets by chance. Made by `Ports`; also a context manager."""

    def __init__(self, holder: socket.socket, taken: set[int]) -> None:
        self.host: str
        self.port: int
        self.host, self.port = holder.getsockname()
        self._holder = holder
        self._taken = taken
        taken.add(self.port)

    @property
    def url(self) -> str:
        """Of what listens there."""
        return f"http://{self.host}:{self.port}"

    def place(self, slots: tuple[int, ...], api_key: str) -> Place:
        """Where an engine of these slots listens."""
        return Place(slots, self.port, api_key, self.host)

    def close(self) -> None:
        """Give the port back; a server that listens there goes on. May be called again."""
        if self._holder.fileno() >= 0:
            self._holder.close()
            self._taken.remove(self.port)

    def __enter__(self) -> PortReservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ports:
    """All reservations of a process, no port twice. Owned by the agent's loop.

    Another process that asks for the same port, and sets ``SO_REUSEADDR``, is not kept from it: of the two servers the
    second finds that it can't listen.

    Args:
        host: the IPv4 address that all of them are of.
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        self._host = host
        self._taken: set[int] = set()

    def reserve(self, port: int = 0) -> PortReservation:
        """Reserve a port; 0 lets the system choose one.

        Raises:
            OSError: ``EADDRINUSE``: it is reserved here, somebody listens there or has it for himself; or no port is
                left; ``EACCES``: it is the system's own.
        """
        if port in self._taken:  # which the system would allow
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: port {port} is another engine's")
        holder = socket.socket()  # not inherited
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((self._host, port))
            return PortReservation(holder, self._taken)
        except BaseException:
            holder.close()
            raise
