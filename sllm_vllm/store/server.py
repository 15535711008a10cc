"""The daemon's side of the Unix socket: accepts connections and answers requests. Runs on the daemon's event loop.

A connection may hold one lease. The lease ends with the connection, even if the client is killed, because the kernel
closes its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from sllm_vllm.config import REPLY_NBYTES_MAX, REQUEST_NBYTES_MAX
from sllm_vllm.errors import CheckpointMissing, ConfigError, SllmError, StoreRefused, WriteError
from sllm_vllm.store.channel import PROTOCOL_VERSION, peer_of
from sllm_vllm.store.core.events import GiveSpan
from sllm_vllm.store.orders import Orders
from sllm_vllm.store.protocol import (
    Answer,
    Failed,
    Find,
    FrameReader,
    Given,
    Hello,
    Hint,
    LeaseOrder,
    Order,
    Ping,
    ProtocolError,
    RefusedReply,
    Release,
    Request,
    StoreReply,
    StoreWelcome,
    decode_request,
    encode,
)
from sllm_vllm.store.store import Store

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
_RECEIVE_NBYTES = 1 << 16


class StoreServer:
    """Accepts connections and answers them.

    Args:
        orders: carries out operators' orders.
        clients_max: most concurrent connections.
    """

    def __init__(self, store: Store, orders: Orders, *, clients_max: int) -> None:
        self._store = store
        self._clients_max = clients_max
        self._orders = orders
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_clients(self) -> int:
        """Number of open connections."""
        return len(self._tasks)

    async def accept(self, listener: socket.socket) -> None:
        """Accept one connection and start serving it, or close it if there are too many. One step of a run loop.

        Raises:
            OSError: the connection can't be accepted, e.g. no descriptor is left.
        """
        loop = asyncio.get_running_loop()
        channel, _ = await loop.sock_accept(listener)
        if len(self._tasks) >= self._clients_max:
            logger.warning("event=connection_refused reason=clients_max clients=%d", len(self._tasks))
            channel.close()
            return
        task = loop.create_task(self._converse(channel))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=connection_failed", exc_info=error)

    async def close(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _converse(self, channel: socket.socket) -> None:
        with contextlib.closing(channel):
            channel.setblocking(False)
            await self._converse_with(Connection(channel, self._store, self._orders))

    async def _converse_with(self, connection: Connection) -> None:
        try:
            if connection.uid in (0, os.geteuid()):
                await connection.converse()
            else:
                logger.warning("event=connection_refused reason=other_user uid=%d", connection.uid)
        except (ProtocolError, TimeoutError, OSError) as error:
            logger.info("event=connection_ended pid=%d reason=%s", connection.pid, error)
        finally:
            connection.close()


class Connection:
    """A client's connection. Implements ``Taker``: forwards spans that the store gives as ``Given`` messages."""

    def __init__(self, channel: socket.socket, store: Store, orders: Orders) -> None:
        self._channel = channel
        self._store = store
        self._orders = orders
        self._frames = FrameReader(REQUEST_NBYTES_MAX)
        self._token: int | None = None
        self._outbox = bytearray()
        self._sender: asyncio.Task[None] | None = None
        self.pid, self.uid = peer_of(channel)

    async def converse(self) -> None:
        """Answer requests until the client closes the connection.

        Raises:
            ProtocolError, OSError, TimeoutError: the connection must be closed.
        """
        bodies = self._bodies()
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = decode_request(await anext(bodies, b""))
        if not isinstance(hello, Hello):
            raise ProtocolError("the first word was no hello")
        if hello.version != PROTOCOL_VERSION:
            problem = f"its daemon speaks version {PROTOCOL_VERSION} of the protocol, you speak {hello.version}"
            self._send(_refused(StoreRefused(self._store.config.socket_path, problem, "restart the older of the two")))
            await self._flushed()
            return
        self._welcome()
        async for body in bodies:
            await self._answer(decode_request(body))

    def given(self, spans: Sequence[GiveSpan]) -> None:
        """See ``Taker``."""
        told = tuple((action.span, action.slot, action.keep) for action in spans)
        self._send(Given(token=spans[0].token, spans=told))

    def failed(self, error: SllmError) -> None:
        """See ``Taker``."""
        assert self._token is not None
        refused = _refused(error)
        told = {name: getattr(refused, name) for name in ("error", "path", "problem", "mend")}
        self._send(Failed(token=self._token, **told))

    def close(self) -> None:
        """Close the connection and end its lease."""
        if self._token is not None:
            self._store.close_lease(self._token)
            self._token = None
        if self._sender is not None:
            self._sender.cancel()
        self._channel.close()

    async def _bodies(self) -> AsyncIterator[bytes]:
        """Yield the bodies of frames as they arrive."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._channel, _RECEIVE_NBYTES):
            for body in self._frames.feed(data):
                yield body

    def _welcome(self) -> None:
        pool = self._store.pool
        welcome = StoreWelcome(
            version=PROTOCOL_VERSION,
            slot_nbytes=pool.slot_nbytes,
            num_slots=pool.num_slots,
            page_nbytes=pool.page_nbytes,
        )
        socket.send_fds(self._channel, [encode(welcome)], [pool.client_fd])

    async def _answer(self, request: Request) -> None:
        match request:
            case Release():
                if request.token == self._token:  # ignore spans of an earlier lease
                    self._store.release(request.token, request.spans)
            case Ping():
                self._send(StoreReply())
            case Hint():
                self._orders.hint(request)
            case LeaseOrder():
                await self._or_refuse(lambda: self._lease(request))
            case Find():
                await self._or_refuse(lambda: self._orders.find(request))
            case Order():
                await self._or_refuse(lambda: self._orders.carry_out(request))
            case Hello():
                raise ProtocolError("a second hello")

    async def _lease(self, request: LeaseOrder) -> Answer:
        if self._token is not None:
            raise ProtocolError("a second lease on one connection")
        placed = await self._store.places.find(request.checkpoint)
        if placed.partition(request.rank).content_digest != request.digest:
            problem = "it has changed since it was opened"
            raise CheckpointMissing(placed.checkpoint.path, problem, "load it again")
        leased = await self._store.lease(placed, request.rank, hold=request.hold, taker=self, pid=self.pid)
        self._token = leased.token
        self._orders.lease_opened(placed)
        return leased

    async def _or_refuse(self, answer: Callable[[], Awaitable[Answer]]) -> None:
        try:
            self._send(await answer())
        except SllmError as error:
            self._send(_refused(error))

    def _send(self, message: Answer) -> None:
        self._outbox += encode(message)
        if len(self._outbox) > 2 * REPLY_NBYTES_MAX:
            logger.warning("event=connection_ended pid=%d reason=does_not_read", self.pid)
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
        elif self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the reading side also notices, and closes the connection
            while self._outbox:
                data = bytes(self._outbox)
                self._outbox.clear()
                await loop.sock_sendall(self._channel, data)

    async def _flushed(self) -> None:
        if self._sender is not None:
            await self._sender


def _refused(error: SllmError) -> RefusedReply:
    """Make the message that reports an error; it names the error's class, so that the client can raise it again."""
    path, problem, mend = (str(getattr(error, name, "")) for name in ("path", "problem", "mend"))
    kind = "StoreRefused" if isinstance(error, ConfigError | WriteError) else type(error).__name__
    return RefusedReply(error=kind, path=path, problem=problem or str(error), mend=mend)
