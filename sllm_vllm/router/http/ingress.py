"""The router's HTTP front end: an ASGI app over many models. Owns routes, keys, limits and the access log.

Requests for models go through ``proxy.py``; everything else is answered here. Runs under ``serve.py`` and uses no web
framework.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import quote

from sllm_vllm.router.config.keys import Keys, bearer_key
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.engine_client.headers import Headers, shown_id, value_of, values_of
from sllm_vllm.router.gate import Gate, ServedModel
from sllm_vllm.router.http.admission import Admission, Body, BodyBounds, BodyReader, digest_of, is_small, read_body
from sllm_vllm.router.http.deadline import Ended, Message, Receive, Send, send_last, telling_slow
from sllm_vllm.router.http.errors import (
    SERVER,
    ApiError,
    no_such_path,
    overloaded,
    unauthorized,
    unknown_model,
    wrong_method,
)
from sllm_vllm.router.http.openapi import openapi_document
from sllm_vllm.router.http.proxy import AdmittedRequest, Proxy, Report
from sllm_vllm.router.pauses import json_of_many

logger = logging.getLogger(__name__)

ENGINE_PATHS = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/detokenize",
        "/generative_scoring",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
        "/v2/embed",
        "/v2/rerank",
    }
)
"""Engine paths outside of /v1/ that clients may use. An engine's health, metrics and controls can't be reached."""
CONTROL_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"})
FORM_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
_ENGINE_PATH = re.compile(rb"/v1(?:/[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}){1,6}")
_QUERY = re.compile(rb"[!-~]*")
_MODELS = "/v1/models"
_CORS_S = "600"
READERS_MAX = 2
"""Threads that read large bodies; with more, the loop would only wait longer for Python's interpreter lock."""


@dataclass(slots=True)
class RequestHead:
    """A request's head. ``shown``: its X-Request-Id; ``id`` is unique even if two clients send the same one."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    shown: str
    id: str
    began_s: float = field(default_factory=time.monotonic)
    model: str = ""


class IngressSwitch:
    """The ingress with the current settings, and earlier ones that still have requests."""

    def __init__(self, ingress: Ingress) -> None:
        self.current = ingress
        self._replaced: list[Ingress] = []

    def replace(self, ingress: Ingress) -> None:
        """Use another ingress for new requests; the old one finishes those that it has."""
        self._replaced.append(self.current)
        self.current = ingress
        for idle in [one for one in self._replaced if one.is_idle]:
            idle.close()
            self._replaced.remove(idle)

    def close(self) -> None:
        """Close the connections to engines."""
        for ingress in (*self._replaced, self.current):
            ingress.close()


class Ingress:
    """The ASGI app. All calls on one event loop; ``close`` closes its connections to engines."""

    def __init__(self, gate: Gate, settings: IngressSettings) -> None:
        self._gate = gate
        self._settings = settings
        self._keys = Keys(settings.key_digests)
        self._proxy: Proxy | None = None
        self._num_requests = 0
        self._served: Sequence[ServedModel] | None = None
        self._names: dict[str, ServedModel] = {}
        self._bodies = BodyReader(settings)
        self._bounds = BodyBounds(settings.json_depth_max, settings.json_containers_max)
        self._readers = ThreadPoolExecutor(READERS_MAX, thread_name_prefix="body")
        self._open_document = json.dumps(openapi_document()).encode()
        self._local: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/health": lambda: (200, b"{}"),
            "/ready": self._ready,
            "/openapi.json": lambda: (200, self._open_document),
        }

    @property
    def is_idle(self) -> bool:
        """Whether it has no request."""
        return self._num_requests == 0

    def close(self) -> None:
        """Close the connections to engines."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._proxy is not None:
            self._proxy.close()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request, as ASGI defines it."""
        if scope["type"] != "http":
            return
        request = _read_head(scope)
        report = Report()
        self._num_requests += 1
        try:
            await self._answer(request, report, receive=telling_slow(scope, receive), send=send)
        except ApiError as error:
            await self._tell(request, report, error=error, send=send)
        except Ended as ended:  # the client is gone
            report.how = ended.reason
        except Exception:  # top of a run loop
            logger.exception("request failed id=%s path=%r", request.id, request.path)
            if report.status is None:
                failure = ApiError(500, "The router failed; see its log.", kind=SERVER)
                await self._tell(request, report, error=failure, send=send)
        finally:
            self._num_requests -= 1
            _log(request, report)

    async def _answer(self, request: RequestHead, report: Report, *, receive: Receive, send: Send) -> None:
        if request.method == "OPTIONS" and self._cors_headers(request):
            await self._preflight(request, report, send=send)
            return
        if request.path in self._local:
            _require(request, "GET", "HEAD")
            status, body = self._local[request.path]()
            await self._send(request, report, status=status, body=body, send=send)
            return
        self._require_key(request)
        if _is_models(request.path):
            _require(request, "GET", "HEAD")
            await self._send(request, report, status=200, body=await self._models(request.path), send=send)
            return
        target = _engine_target(request)
        _require(request, "POST")
        await self._forward(request, report, target=target, receive=receive, send=send)

    async def _forward(
        self, request: RequestHead, report: Report, *, target: str, receive: Receive, send: Send
    ) -> None:
        if self._num_requests > self._settings.requests_max:
            raise overloaded(f"{self._settings.requests_max} requests at once is the limit").closing()
        if value_of(request.headers, b"content-encoding").lower() not in {b"", b"identity"}:
            raise ApiError(415, "Compressed bodies are not supported.").closing()
        async with self._bodies.read(request.headers, receive) as body:
            admission = self._named(await self._read(request, body))
            request.model = admission.model
            self._require_model(admission.model)
            facts = replace(admission.facts(request.id), digest=await digest_of(target, body))
            call = AdmittedRequest(facts, request.shown, target=target, headers=request.headers, body=body)
            extra = self._common_headers(request)
            if self._proxy is None:  # it needs a running loop
                self._proxy = Proxy(self._gate, self._settings)
            await self._proxy.run(call, report, receive=receive, send=send, extra=extra)

    async def _read(self, request: RequestHead, body: Body) -> Admission:
        """Read what the router needs of a body; a large one in a thread, so that the loop is not blocked."""
        content_type = value_of(request.headers, b"content-type")
        takes_form = request.path in FORM_PATHS
        read = partial(read_body, body, content_type, takes_form=takes_form, bounds=self._bounds)
        if is_small(body):
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    def _named(self, admission: Admission) -> Admission:
        """Fill in the model if the body names none and only one is served."""
        if admission.model:
            return admission
        served = self._gate.served()
        if len(served) != 1:
            raise ApiError(400, "`model` is missing.", param="model")
        return replace(admission, model=served[0].name)

    def _require_model(self, name: str) -> None:
        served = self._gate.served()
        if served is not self._served or not isinstance(served, tuple):  # not at each request: there may be thousands
            self._served = served
            self._names = {model.name: model for model in served}
        if name not in self._names:
            raise unknown_model(name, list(self._names))

    def _require_key(self, request: RequestHead) -> None:
        if self._keys.is_open:
            return
        keys = [bearer_key(values_of(request.headers, b"authorization")), *values_of(request.headers, b"x-api-key")[:1]]
        if not any(self._keys.allow(key) for key in keys if key):
            raise unauthorized()

    def _ready(self) -> tuple[int, bytes]:
        return (200, b'{"ready": true}') if self._gate.is_ready() else (503, b'{"ready": false}')

    async def _models(self, path: str) -> bytes:
        if path == _MODELS:
            return await json_of_many("data", map(self._card, self._gate.served()), object="list")
        name = path.removeprefix(_MODELS + "/")
        self._require_model(name)
        return json.dumps(self._card(self._names[name])).encode()

    def _card(self, model: ServedModel) -> dict[str, object]:
        is_hidden = model.root.startswith("/") and not self._settings.show_paths
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "sllm-vllm",
            "root": model.name if is_hidden else model.root,
            "max_model_len": model.max_model_len,
        }

    async def _preflight(self, request: RequestHead, report: Report, *, send: Send) -> None:
        asked = value_of(request.headers, b"access-control-request-headers") or b"*"
        allowed: Headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST"),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", _CORS_S.encode()),
        ]
        await self._send(request, report, status=204, body=b"", send=send, headers=allowed)

    def _cors_headers(self, request: RequestHead) -> Headers:
        origin = value_of(request.headers, b"origin")
        origins = self._settings.cors_origins
        if not origin or (origin.decode("latin-1") not in origins and "*" not in origins):
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"Origin"),
        ]

    def _common_headers(self, request: RequestHead) -> Headers:
        return [(b"x-request-id", request.shown.encode()), *self._cors_headers(request)]

    async def _tell(self, request: RequestHead, report: Report, *, error: ApiError, send: Send) -> None:
        headers = [*error.headers, (b"connection", b"close")] if error.closes else error.headers
        await self._send(
            request, report, status=error.status, body=error.body_for(request.path), send=send, headers=headers
        )

    async def _send(
        self,
        request: RequestHead,
        report: Report,
        *,
        status: int,
        body: bytes,
        send: Send,
        headers: Headers | None = None,
    ) -> None:
        report.status = status
        kind: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        own = kind if status != 204 else []
        all_headers = [*own, *self._common_headers(request), *(headers or [])]
        await send_last(
            send,
            {"type": "http.response.start", "status": status, "headers": all_headers},
            {"type": "http.response.body", "body": body, "more_body": False},
        )


def _read_head(scope: Message) -> RequestHead:
    headers: Headers = scope["headers"]
    path: str = scope["path"]
    shown = shown_id(headers)
    # Two clients may send the same id, so the router's own gets a random suffix.
    own = shown if not value_of(headers, b"x-request-id") else f"{shown}-{uuid.uuid4().hex[:8]}"
    return RequestHead(
        method=scope["method"],
        path=path,
        raw_path=scope.get("raw_path") or quote(path).encode(),
        query=scope["query_string"],
        headers=headers,
        shown=shown,
        id=own,
    )


def _engine_target(request: RequestHead) -> str:
    """Path and query for an engine. Only listed paths, written without escapes and dot segments."""
    path = request.raw_path.decode("latin-1")
    is_listed = path in ENGINE_PATHS or (_ENGINE_PATH.fullmatch(request.raw_path) and path not in CONTROL_PATHS)
    if not is_listed:
        raise no_such_path(request.path)
    if not _QUERY.fullmatch(request.query):
        raise ApiError(400, "The query holds a character that must be escaped.")
    return f"{path}?{request.query.decode()}" if request.query else path


def _is_models(path: str) -> bool:
    return path == _MODELS or path.startswith(_MODELS + "/")


def _require(request: RequestHead, *methods: str) -> None:
    if request.method not in methods:
        raise wrong_method(request.method, methods)


def _log(request: RequestHead, report: Report) -> None:
    logger.info(
        "request id=%s path=%r model=%r status=%s outcome=%s ttfb_ms=%s seconds=%.3f replica=%s attempts=%d",
        request.id,
        request.path[:200],
        request.model[:200],
        report.status,
        report.how or "local",
        "-" if report.first_byte_s is None else f"{report.first_byte_s * 1000:.1f}",
        time.monotonic() - request.began_s,
        report.replica or "-",
        report.attempts,
    )
