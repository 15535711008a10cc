"""The agent's socket: turns HTTP requests into calls of the agent. Lives on the agent's loop; ``daemon.py`` runs it.

Decides nothing about replicas. Only this user and root may connect, so a request needs no key; engines' keys are in
answers, but never in a log line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sllm_vllm.daemon.unix_listener import is_trusted, peer_of
from sllm_vllm.errors import (
    CheckpointError,
    CheckpointMissing,
    ConfigError,
    NodeError,
    OrderRefused,
    RemoteError,
    ReplicaUnknown,
    SllmError,
    StoreError,
    StoreUnavailable,
)
from sllm_vllm.node.protocol import REQUEST_NBYTES_MAX, NodeReport, ReplicaOrder, ReplicaReport

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 128
"""Clients at once, as far as the limit of descriptors allows; further connections are closed."""
SHUTDOWN_S = 2.0
"""How long answers under way may take to finish once the agent has closed."""
TAIL_NBYTES_MAX = 1 << 40

STATUSES: tuple[tuple[type[SllmError], int], ...] = (
    # The first match wins.
    (ReplicaUnknown, 404),
    (OrderRefused, 409),
    (CheckpointMissing, 404),
    (CheckpointError, 422),
    (ConfigError, 400),
    (StoreUnavailable, 503),
    (StoreError, 502),
    (RemoteError, 502),
    (SllmError, 500),
)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent(Protocol):
    """The agent to serve: ``agent.NodeAgent``."""

    @property
    def num_slots(self) -> int:
        """The number of slots; known once the agent has started."""

    async def start(self) -> None:
        """Begin to take orders."""

    async def close(self) -> None:
        """End every engine, then return; does nothing if it is closed."""

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        """Accept an order. Raises ``OrderRefused``."""

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        """Ask a replica to end. Raises ``ReplicaUnknown``."""

    def replica(self, replica_id: str) -> ReplicaReport:
        """A replica's current report. Raises ``ReplicaUnknown``."""

    def find(self, prefix: str) -> str:
        """The id with this prefix. Raises ``ReplicaUnknown``."""

    def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        """Yield reports from now until it has ended."""

    async def prefetch(self, checkpoint: str) -> None:
        """Have a checkpoint read into memory. Raises ``SllmError``."""

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        """The state of the whole node."""

    def logs(self, replica_id: str, *, tail_nbytes: int | None, follow: bool) -> AsyncIterator[bytes]:
        """A replica's output."""

    def story(self, replica_id: str) -> list[str]:
        """The last events and actions of a replica."""


class PrefetchOrder(BaseModel):
    """Body of ``POST /v1/prefetch``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    checkpoint: str = Field(min_length=1, max_length=4096)


class _BadRequest(NodeError):
    """An invalid request."""


class AgentServer:
    """Accepts connections and answers them, from ``start`` to ``close``.

    Args:
        stop: called when a client asks the agent to end.
        connections_max: clients at once.
    """

    def __init__(self, agent: Agent, *, stop: Callable[[], None], connections_max: int = CONNECTIONS_MAX) -> None:
        self._agent = agent
        self._connections_max = connections_max
        self._stop = stop
        self._orders: set[asyncio.Task[Any]] = set()
        app = web.Application(client_max_size=REQUEST_NBYTES_MAX, middlewares=[_told_as_json])
        one = "/v1/replicas/{id}"
        app.add_routes(
            [
                web.get("/v1/report", self._report),
                web.post("/v1/replicas", self._ensure),
                web.get(one, self._replica),
                web.delete(one, self._stop_replica),
                web.get(f"{one}/watch", self._watch),
                web.get(f"{one}/logs", self._logs),
                web.get(f"{one}/story", self._story),
                web.post("/v1/prefetch", self._prefetch),
                web.post("/v1/stop", self._stop_agent),
            ]
        )
        # A handler is cancelled when its client disconnects. No access log: it would have no reader on a node.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S
        )

    async def start(self) -> None:
        """Prepare to serve."""
        await self._runner.setup()

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections until cancelled, or until accepting one fails."""
        while True:
            await self.accept(listener)

    async def accept(self, listener: socket.socket) -> None:
        """Accept one connection, and serve or close it; a step of a run loop.

        Raises:
            OSError: there is no descriptor for it.
        """
        loop = asyncio.get_running_loop()
        channel, _ = await loop.sock_accept(listener)
        try:
            if self._is_let_in(channel):
                server = self._runner.server
                assert server is not None
                channel.setblocking(False)
                await loop.connect_accepted_socket(server, channel)
                return
        except BaseException:
            channel.close()
            raise
        channel.close()

    def _is_let_in(self, channel: socket.socket) -> bool:
        _, uid = peer_of(channel)
        if not is_trusted(uid):
            logger.warning("event=connection_refused reason=other_user uid=%d", uid)
            return False
        server = self._runner.server
        if server is None or len(server.connections) >= self._connections_max:
            logger.warning("event=connection_refused reason=connections_max connections=%d", self._connections_max)
            return False
        return True

    async def close(self) -> None:
        """End every connection; answers under way get ``SHUTDOWN_S``."""
        await self._runner.cleanup()
        for task in self._orders:
            task.cancel()
        await asyncio.gather(*self._orders, return_exceptions=True)

    async def _report(self, request: web.Request) -> web.Response:
        return _answer(await self._agent.report(with_memory=_flag(request, "memory")))

    async def _ensure(self, request: web.Request) -> web.Response:
        order = await _body(request, ReplicaOrder)
        report = await self._whole(self._agent.ensure_replica(order))
        logger.info("event=order_accepted replica=%s state=%s", report.id, report.state)
        return _answer(report, status=201)

    async def _replica(self, request: web.Request) -> web.Response:
        return _answer(self._agent.replica(self._id(request)))

    async def _stop_replica(self, request: web.Request) -> web.Response:
        report = await self._whole(self._agent.stop_replica(self._id(request)))
        logger.info("event=stop_asked replica=%s state=%s", report.id, report.state)
        return _answer(report)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        reports = self._agent.watch(self._id(request))
        return await _stream(request, "application/x-ndjson", _lines(reports))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        tail, follow = _tail(request), _flag(request, "follow")
        chunks = self._agent.logs(self._id(request), tail_nbytes=tail, follow=follow)
        return await _stream(request, "application/octet-stream", chunks)

    async def _story(self, request: web.Request) -> web.Response:
        return web.json_response({"story": self._agent.story(self._id(request))})

    async def _prefetch(self, request: web.Request) -> web.Response:
        order = await _body(request, PrefetchOrder)
        await self._agent.prefetch(order.checkpoint)
        return web.json_response({})

    async def _stop_agent(self, request: web.Request) -> web.Response:
        logger.info("event=agent_stop_asked")
        self._stop()
        return web.json_response({}, status=202)

    def _id(self, request: web.Request) -> str:
        return self._agent.find(request.match_info["id"])

    async def _whole(self, order: Coroutine[Any, Any, T]) -> T:
        """Carry out an order completely, even if the client disconnects meanwhile."""
        task = asyncio.get_running_loop().create_task(order)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)
        return await asyncio.shield(task)


@web.middleware
async def _told_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into the same JSON record, with a matching status."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        path, mend = request.path, "see the routes in node/server.py"
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            path, mend = "body", f"send {REQUEST_NBYTES_MAX} bytes at most"
        return _refusal(error.status, NodeError(path, error.reason, mend))
    except _BadRequest as error:
        return _refusal(400, NodeError(error.path, error.problem, error.mend))
    except SllmError as error:
        return _refusal(next(status for kind, status in STATUSES if isinstance(error, kind)), error)


def _refusal(status: int, error: SllmError) -> web.Response:
    path, problem, mend = (str(getattr(error, name, "")) for name in ("path", "problem", "mend"))
    told = {"kind": type(error).__name__, "path": path, "problem": problem or str(error), "mend": mend}
    return web.json_response({"error": told}, status=status)


def _answer(report: BaseModel, *, status: int = 200) -> web.Response:
    return web.Response(body=report.model_dump_json(), status=status, content_type="application/json")


Body = TypeVar("Body", bound=BaseModel)


async def _body(request: web.Request, kind: type[Body]) -> Body:
    """Parse the request's body. An error does not quote the value, which may be a secret."""
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise _BadRequest(field, first["msg"], f"send the fields of {kind.__name__} as JSON") from None


def _flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "0")
    if value not in {"0", "1"}:
        raise _BadRequest(name, "it is neither 0 nor 1", "give one of them")
    return value == "1"


def _tail(request: web.Request) -> int | None:
    value = request.query.get("tail")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 13 and int(value) <= TAIL_NBYTES_MAX):
        raise _BadRequest("tail", "it is not a number of bytes", "give a whole number, or leave it out")
    return int(value)


async def _lines(reports: AsyncIterator[ReplicaReport]) -> AsyncGenerator[bytes]:
    async with _ending(reports):
        async for report in reports:
            yield report.model_dump_json().encode() + b"\n"


async def _stream(request: web.Request, content_type: str, chunks: AsyncIterator[bytes]) -> web.StreamResponse:
    """Stream chunks as they arrive. If the agent fails, abort the connection, so that the client sees an incomplete
    answer."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    async with _ending(chunks):
        await response.prepare(request)
        try:
            async for chunk in chunks:
                await response.write(chunk)
        except SllmError as error:
            logger.warning("event=stream_broken path=%s reason=%s", request.path, error)
            if request.transport is not None:
                request.transport.abort()
    return response


@contextlib.asynccontextmanager
async def _ending(stream: AsyncIterator[T]) -> AsyncIterator[None]:
    """Close a generator as soon as it is no longer read, not when it is garbage-collected."""
    try:
        yield
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
