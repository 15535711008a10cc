"""Runs the ingress under uvicorn on a running loop, with limits, without uvicorn's signal handlers and logs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator, Sequence
from typing import Protocol

import uvicorn

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.config.values import needs_keys
from sllm_vllm.router.http.client_state import ClientCounts
from sllm_vllm.router.http.deadline import Message, Receive, Send
from sllm_vllm.router.http.limits import limited_protocol


class App(Protocol):
    """What is served: ``ingress.Ingress``, or an app in front of it."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request, as ASGI defines it."""
        ...

    def close(self) -> None:
        """Called when serving has ended."""
        ...


async def serve_app(
    app: App,
    settings: IngressSettings,
    *,
    sockets: Sequence[socket.socket],
    started: asyncio.Event | None = None,
    counts: ClientCounts | None = None,
) -> None:
    """Serve on bound sockets until cancelled; then requests have ``drain_s`` to finish. Closes ``app``.

    ``counts`` receives the numbers of clients' connections.

    Raises:
        ConfigError: there are no keys, and other machines can connect.
    """
    require_keys(settings, sockets)
    server = _IngressServer(_config(app, settings, counts or ClientCounts()), started)
    serving = asyncio.create_task(server.serve(sockets=list(sockets)))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise
    finally:
        app.close()


def require_keys(settings: IngressSettings, sockets: Sequence[socket.socket]) -> None:
    """Refuse to serve other machines without keys, unless the settings allow it.

    Raises:
        ConfigError: other machines could connect without a key.
    """
    hosts = [str(one.getsockname()[0]) for one in sockets if one.family in {socket.AF_INET, socket.AF_INET6}]
    for host in hosts:
        if needs_keys(host, has_keys=bool(settings.key_digests), is_insecure=settings.insecure_no_keys):
            raise ConfigError(
                f"{host} can be reached from outside and there are no keys; give keys, or listen on 127.0.0.1"
            )


class _IngressServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: asyncio.Event | None) -> None:
        super().__init__(config)
        self._started_event = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Set ``started`` once the server listens."""
        await super().startup(sockets)
        if self._started_event is not None:
            self._started_event.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none: signals belong to the owner of the loop."""
        yield


def _config(app: App, settings: IngressSettings, counts: ClientCounts) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(settings, counts),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_s,
    )
