"""The outermost layer of an engine's API server: without the engine's key it answers only ``/health``.

vLLM requires its key only below ``/v1``, ``/v2``, ``/inference`` and ``/cohere``. The node agent passes this class in
every engine's arguments, with ``--middleware``, so it does not depend on ``VLLM_PLUGINS`` or on the model's task. At
the top it imports only the standard library, because a forked engine imports it between its order and its first answer.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATH = "/health"
_REFUSAL = b'{"error":"Unauthorized"}'
_POLICY_VIOLATION = 1008
"""Close code of RFC 6455. If the server has not accepted the websocket yet, it answers the handshake with 403."""


class EngineGuard:
    """ASGI middleware. vLLM makes one in each API server. If no key is configured, it refuses all but ``/health``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._digests: tuple[bytes, ...] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request, a websocket, or the server's own startup and shutdown."""
        if scope["type"] == "lifespan" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _has_key(self, scope: Message) -> bool:
        """Whether a request carries one of the keys. It is compared with all of them, each in constant time."""
        if self._digests is None:
            self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in _keys_of(scope))
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (found[0] if len(found) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(key).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(known, digest)
        return is_known and scheme.lower() == b"bearer"


def _is_open(scope: Message) -> bool:
    """Whether a request needs no key: a health check, or a browser's preflight, which vLLM's CORS layer answers."""
    if scope["type"] != "http":
        return False
    if scope["method"] == "OPTIONS":
        names = {name for name, _ in scope["headers"]}
        return {b"origin", b"access-control-request-method"} <= names
    return scope["method"] in {"GET", "HEAD"} and scope["path"] == OPEN_PATH


def _keys_of(scope: Message) -> Iterable[str]:
    """The keys that vLLM itself accepts: those of ``--api-key``, else ``VLLM_API_KEY``."""
    import vllm.envs as envs

    said = getattr(getattr(scope.get("app"), "state", None), "args", None)
    return [key for key in (getattr(said, "api_key", None) or [envs.VLLM_API_KEY]) if key]
