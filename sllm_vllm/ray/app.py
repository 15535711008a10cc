"""An ASGI app: an ingress whose controller is in another process. Its lifespan is that of its session. One loop."""

from __future__ import annotations

import logging
from typing import Protocol

from sllm_vllm.ray.gate import RemoteGate
from sllm_vllm.ray.session import ControllerGone, ControllerLink
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.http.admission import BodyReader
from sllm_vllm.router.http.deadline import Message, Receive, Send, send_last
from sllm_vllm.router.http.errors import SERVER, ApiError
from sllm_vllm.router.http.ingress import Ingress, IngressSwitch

logger = logging.getLogger(__name__)

_ADMIN_BODIES = IngressSettings(body_bytes=1 << 20, bodies_bytes=16 << 20)
_SCOPE = ("type", "method", "path", "query_string", "headers")
"""The parts of an operator's request's scope that are passed on."""


class AppLink(ControllerLink, Protocol):
    """A connection to a remote controller that also serves operators."""

    async def admin(self, scope: Message, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Pass an operator's request on. Returns status, headers and body. Raises ``ControllerGone``."""
        ...


class RemoteApp:
    """Sends requests for models to the ingress with the current settings, and operators' requests to the controller."""

    def __init__(self, link: AppLink, *, name: str) -> None:
        self._link = link
        self._gate = RemoteGate(name, link, on_settings=self._set_settings)
        self._bodies = BodyReader(_ADMIN_BODIES)
        self._settings: IngressSettings | None = None
        self._ingresses: IngressSwitch | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request, or the app's lifespan."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            return
        elif scope["path"].startswith("/sllm/") or scope["path"] == "/metrics":
            await self._pass_on(scope, receive, send)
        else:
            assert self._ingresses is not None, "its lifespan has not begun"
            await self._ingresses.current(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._gate.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._gate.close()
                if self._ingresses is not None:
                    self._ingresses.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            async with self._bodies.read(scope["headers"], receive) as body:
                status, headers, answer = await self._link.admin({key: scope[key] for key in _SCOPE}, bytes(body))
        except ApiError as error:
            status, headers, answer = _refusal(error)
        except ControllerGone:
            gone = ApiError(503, "The controller is starting again.", kind=SERVER, code="controller_gone")
            status, headers, answer = _refusal(gone)
        await send_last(
            send,
            {"type": "http.response.start", "status": status, "headers": headers},
            {"type": "http.response.body", "body": answer, "more_body": False},
        )

    def _set_settings(self, settings: IngressSettings) -> None:
        """Use these settings for new requests; the old ingress finishes those that it has."""
        if settings == self._settings:
            return
        self._settings = settings
        ingress = Ingress(self._gate, settings)
        if self._ingresses is None:
            self._ingresses = IngressSwitch(ingress)
        else:
            self._ingresses.replace(ingress)


def _refusal(error: ApiError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    length = str(len(error.body)).encode()
    return error.status, [(b"content-type", b"application/json"), (b"content-length", length)], error.body
