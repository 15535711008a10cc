"""Ports of engines: a socket that never listens reserves each port from the order until its engine ends.

An engine binds its port itself, seconds after it was chosen. Until then the agent's socket holds it: on Linux, sockets
that all have ``SO_REUSEADDR`` may be bound to one port as long as none listens, and one of them may then listen.
Meanwhile the system gives the port neither to a process that asks for any free port nor to an outgoing connection. A
connection of the port's previous user that the system still remembers (``TIME_WAIT``) does not prevent a reservation.
"""

from __future__ import annotations

import errno
import os
import socket
from types import TracebackType

from sllm_vllm.node.core.launch import LOOPBACK, Place


class PortReservation:
    """A port of an address that no other process gets by chance. Made by `Ports`; also a context manager."""

    def __init__(self, holder: socket.socket, taken: set[int]) -> None:
        self.host: str
        self.port: int
        self.host, self.port = holder.getsockname()
        self._holder = holder
        self._taken = taken
        taken.add(self.port)

    @property
    def url(self) -> str:
        """The URL of the server there."""
        return f"http://{self.host}:{self.port}"

    def place(self, slots: tuple[int, ...], api_key: str) -> Place:
        """Where an engine on these slots listens."""
        return Place(slots, self.port, api_key, self.host)

    def close(self) -> None:
        """Release the port; a server that listens on it is not affected. May be called again."""
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
    """All reservations of a process, each for a different port. Owned by the agent's loop.

    Another process that asks for the same port, and sets ``SO_REUSEADDR``, is not prevented: the second of the two
    servers then fails to listen.

    Args:
        host: the IPv4 address of all ports.
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        self._host = host
        self._taken: set[int] = set()

    def reserve(self, port: int = 0) -> PortReservation:
        """Reserve a port; 0 lets the system choose one.

        Raises:
            OSError: ``EADDRINUSE``: the port is reserved here, another process listens on it or has it exclusively, or
                no port is left. ``EACCES``: it is privileged.
        """
        if port in self._taken:  # the system would allow it
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: port {port} is another engine's")
        holder = socket.socket()  # not inheritable
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((self._host, port))
            return PortReservation(holder, self._taken)
        except BaseException:
            holder.close()
            raise
