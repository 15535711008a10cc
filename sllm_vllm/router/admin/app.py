"""The router's admin API: an ASGI app for ``/sllm/v1/…`` and ``/metrics``. Owns its routes and its keys.

It is never open: without keys it refuses everything. Its content comes from ``views.py`` and ``metrics.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sllm_vllm.errors import ConfigError
from sllm_vllm.router.admin import views
from sllm_vllm.router.admin.metrics import registry_of
from sllm_vllm.router.config.file import parse_router_config
from sllm_vllm.router.config.keys import Keys, bearer_key
from sllm_vllm.router.config.sections import ModelConfig, ModelDefaults
from sllm_vllm.router.config.settings import IngressSettings
from sllm_vllm.router.config.text import read_json
from sllm_vllm.router.controller import Controller
from sllm_vllm.router.core.cluster import ReplicaState
from sllm_vllm.router.engine_client.headers import Headers, values_of
from sllm_vllm.router.http.admission import BodyReader
from sllm_vllm.router.http.deadline import Ended, Message, Receive, Send
from sllm_vllm.router.http.errors import (
    NAME_CHARS_MAX,
    SERVER,
    ApiError,
    no_such_path,
    unauthorized,
    wrong_method,
)
from sllm_vllm.router.pauses import json_of_many
from sllm_vllm.router.state.store import StateBusy, StateDamaged, StateError, StateFull
from sllm_vllm.units import MIB

logger = logging.getLogger(__name__)

BODY_NBYTES_MAX = MIB
EVENTS_MAX = 2000
"""Most events per reply, because they are read on the event loop that serves requests."""
EVENTS_DEFAULT = 200
_SETTINGS = IngressSettings(body_bytes=BODY_NBYTES_MAX, bodies_bytes=16 * MIB, body_timeout=30.0)
_JSON = "application/json"
_CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class AdminCall:
    """A request that is allowed. ``name``: the variable part of its path; ``query``: the last value of each key."""

    name: str
    query: dict[str, str]
    body: bytes


_NOT_KEPT = (503, "It could not be kept, and so nothing was changed; the router's log says why.")
_WHY_NOT_KEPT: dict[type[StateError], tuple[int, str]] = {
    StateBusy: (503, "The state is locked by another process, and so nothing was changed; try again."),
    StateFull: (507, "There is no room for the state, and so nothing was changed; free some of the disk."),
    StateDamaged: (500, "The state is damaged, and so nothing was changed; the router's log says what to do."),
}


@dataclass(frozen=True, slots=True)
class AdminReply:
    """An answer: a record to send as JSON, or bytes of content type ``kind``."""

    content: views.Record | bytes
    status: int = 200
    kind: str = _JSON


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload changed, in words, and the warnings about the file."""

    changed: str
    warnings: Sequence[str] = ()


Handler = Callable[[AdminCall], Awaitable[AdminReply]]


class AdminApp:
    """The ASGI app. All calls run on the controller's loop.

    Args:
        key_digests: SHA-256 of each admin key.
        reload: reads the configuration again and applies it; raises ConfigError.
        keep: stores the model served under a name, so that it survives a restart; None removes it; raises StateError.
        check: raises ConfigError for a model that this machine can't serve, and returns warnings about one that it can.
            Default: accepts every model.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        key_digests: Iterable[str],
        reload: Callable[[], Awaitable[Reloaded]],
        keep: Callable[[str, ModelConfig | None], Awaitable[None]],
        check: Callable[[ModelConfig], Sequence[str]] = lambda _: (),
    ) -> None:
        self._controller = controller
        self._keep = keep
        self._check = check
        self._keys = Keys(key_digests)
        self._scrape_keys = Keys(())
        self._reload = reload
        self._defaults = ModelDefaults()
        self._bodies = BodyReader(_SETTINGS)
        self._routes = self._all_routes()

    def set_defaults(self, defaults: ModelDefaults) -> None:
        """Replace the settings of deployed models that do not set them themselves."""
        self._defaults = defaults

    def set_keys(self, key_digests: Iterable[str]) -> None:
        """Replace the admin keys."""
        self._keys = Keys(key_digests)

    def set_scrape_keys(self, key_digests: Iterable[str]) -> None:
        """Replace the keys that give access to ``/metrics`` and nothing else."""
        self._scrape_keys = Keys(key_digests)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            return
        try:
            self._require_key(scope)
            reply = await self._answer(scope, receive)
            if not isinstance(reply.content, bytes):
                content = json.dumps(reply.content, allow_nan=False).encode()
            else:
                content = reply.content
            await _send(send, reply.status, content, headers=[(b"content-type", reply.kind.encode())])
        except ApiError as error:
            await _send_error(send, error)
        except Ended:  # the client left
            return
        except Exception:  # top of a run loop
            logger.exception("event=admin_failed method=%s path=%r", scope["method"], scope["path"][:NAME_CHARS_MAX])
            await _send_error(send, ApiError(500, "The router failed; see its log.", kind=SERVER))

    def _require_key(self, scope: Message) -> None:
        key = bearer_key(values_of(scope["headers"], b"authorization"))
        may_scrape = scope["path"] == "/metrics" and not self._scrape_keys.is_open
        if may_scrape and key is not None and self._scrape_keys.allow(key):
            return
        if self._keys.is_open and not may_scrape:  # no admin keys are configured, so every request is refused
            message = "No admin key is configured; add one under `keys.admin`."
            raise ApiError(403, message, kind="permission_error", code="admin_disabled").closing()
        if key is None or self._keys.is_open or not self._keys.allow(key):
            raise unauthorized().closing()

    async def _answer(self, scope: Message, receive: Receive) -> AdminReply:
        path: str = scope["path"]
        found = [(methods, match[1] if match.re.groups else "") for match, methods in self._matches(path)]
        if not found:
            raise no_such_path(path).closing()
        methods, name = found[0]
        handler = methods.get(scope["method"])
        if handler is None:
            raise wrong_method(scope["method"], tuple(methods)).closing()
        query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        async with self._bodies.read(scope["headers"], receive) as body:
            return await handler(AdminCall(name, query, bytes(body)))

    def _matches(self, path: str) -> Iterable[tuple[re.Match[str], dict[str, Handler]]]:
        for pattern, methods in self._routes.items():
            if match := pattern.fullmatch(path):
                yield match, methods

    def _all_routes(self) -> dict[re.Pattern[str], dict[str, Handler]]:
        """Return the handlers by path and method. Names in paths may hold any character, even slashes."""
        routes: dict[str, dict[str, Handler]] = {
            "/metrics": {"GET": self._metrics},
            "/sllm/v1/models": {"GET": self._models, "POST": self._deploy},
            "/sllm/v1/models/(.+)": {"GET": self._model, "DELETE": self._delete},
            "/sllm/v1/replicas": {"GET": self._replicas},
            "/sllm/v1/replicas/(.+)/drain": {"POST": self._drain_replica},
            "/sllm/v1/requests": {"GET": self._requests},
            "/sllm/v1/requests/(.+)/migrate": {"POST": self._migrate},
            "/sllm/v1/nodes": {"GET": self._nodes},
            "/sllm/v1/nodes/(.+)/drain": {"POST": self._drain_node},
            "/sllm/v1/nodes/(.+)/undrain": {"POST": self._undrain_node},
            "/sllm/v1/stores": {"GET": self._stores},
            "/sllm/v1/events": {"GET": self._events},
            "/sllm/v1/story/(.+)": {"GET": self._story},
            "/sllm/v1/explain/(.+)": {"GET": self._explain},
            "/sllm/v1/reload": {"POST": self._reload_now},
        }
        return {re.compile(path, re.DOTALL): methods for path, methods in routes.items()}

    # ------------------------------------------------------------------------------------------------------ models

    async def _models(self, call: AdminCall) -> AdminReply:
        return AdminReply(await json_of_many("models", views.model_views(self._controller)))

    async def _model(self, call: AdminCall) -> AdminReply:
        self._require_model(call.name)
        return AdminReply(views.model_view(self._controller, call.name))

    async def _deploy(self, call: AdminCall) -> AdminReply:
        model = read_model(call.body, self._defaults)
        try:
            warnings = await asyncio.to_thread(self._check, model)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_model") from None
        await self._controller.measure([model])
        before = self._controller.models.get(model.name)
        await self._kept(model.name, model)
        self._controller.deploy(model)
        done = _change(before, model)
        logger.info("event=deployed model=%r change=%s", model.name, done)
        status = 201 if before is None else 200
        view = views.model_view(self._controller, model.name)
        return AdminReply({"done": done, "warnings": list(warnings), **view}, status)

    async def _delete(self, call: AdminCall) -> AdminReply:
        self._require_model(call.name)
        await self._kept(call.name, None)
        if call.name in self._controller.models:  # it was not deleted meanwhile
            self._controller.delete(call.name)
        logger.info("event=deleted model=%r", call.name)
        return AdminReply({"deleted": call.name})

    async def _kept(self, name: str, model: ModelConfig | None) -> None:
        """Store the change before it is made, so that a change that can't be stored is not made."""
        try:
            await self._keep(name, model)
        except StateError as error:
            logger.error("event=model_not_kept model=%r reason=%s", name, error)
            raise ApiError(*_WHY_NOT_KEPT.get(type(error), _NOT_KEPT), kind=SERVER, code="state_unavailable") from None

    async def _explain(self, call: AdminCall) -> AdminReply:
        self._require_model(call.name)
        return AdminReply(views.explain_view(self._controller, call.name))

    def _require_model(self, name: str) -> None:
        if name not in self._controller.models:
            raise _unknown("model", name)

    # ------------------------------------------------------------------------------------------- replicas and nodes

    async def _replicas(self, call: AdminCall) -> AdminReply:
        return AdminReply(views.replicas_view(self._controller))

    async def _drain_replica(self, call: AdminCall) -> AdminReply:
        replica = self._controller.core.cluster.replicas.get(call.name)
        if replica is None or not replica.model:
            raise _unknown("replica", call.name)
        if replica.state is ReplicaState.ORDERED:
            message = f"The replica {replica.id} is starting; only one that is ready can be drained."
            raise ApiError(409, message, code=_CONFLICT)
        self._controller.drain(replica.id)
        return AdminReply({"replica": replica.id, "state": replica.state.value, "ongoing": len(replica.ongoing)}, 202)

    async def _requests(self, call: AdminCall) -> AdminReply:
        return AdminReply(views.requests_view(self._controller, _last(call)))

    async def _migrate(self, call: AdminCall) -> AdminReply:
        if call.name not in self._controller.core.requests:
            raise _unknown("request", call.name)
        target = _target(call.body)
        if target is not None and target not in self._controller.core.cluster.replicas:
            raise _unknown("replica", target)
        if problem := self._controller.migrate(call.name, target):
            raise ApiError(409, f"The request is not moved: {problem}.", code=_CONFLICT)
        return AdminReply({"request": call.name, "target": self._controller.core.requests[call.name].target}, 202)

    async def _nodes(self, call: AdminCall) -> AdminReply:
        return AdminReply(views.nodes_view(self._controller))

    async def _drain_node(self, call: AdminCall) -> AdminReply:
        node = self._controller.core.cluster.nodes.get(call.name)
        if node is None:
            raise _unknown("node", call.name)
        drained = [replica.id for replica in node.replicas.values() if replica.model]
        self._controller.drain(node.id)
        return AdminReply({"node": node.id, "is_drained": True, "replicas": drained}, 202)

    async def _undrain_node(self, call: AdminCall) -> AdminReply:
        if call.name not in self._controller.core.cluster.nodes:
            raise _unknown("node", call.name)
        self._controller.undrain(call.name)
        return AdminReply({"node": call.name, "is_drained": False})

    async def _stores(self, call: AdminCall) -> AdminReply:
        return AdminReply(views.stores_view(self._controller))

    # -------------------------------------------------------------------------------------------------------- events

    async def _events(self, call: AdminCall) -> AdminReply:
        events, num = self._controller.core.events, _last(call)
        last = list(itertools.islice(events, max(0, len(events) - num), None))
        return AdminReply(views.events_view(last, self._controller.now_s()))

    async def _story(self, call: AdminCall) -> AdminReply:
        story = self._controller.core.story(call.name)[-_last(call) :]
        if not story:
            raise ApiError(404, f"No events are remembered for `{call.name[:NAME_CHARS_MAX]}`.", code="not_found")
        return AdminReply(views.events_view(story, self._controller.now_s()))

    # ------------------------------------------------------------------------------------------------ the whole router

    async def _reload_now(self, call: AdminCall) -> AdminReply:
        try:
            done = await self._reload()
            return AdminReply({"changed": done.changed, "warnings": list(done.warnings)})
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_config") from None

    async def _metrics(self, call: AdminCall) -> AdminReply:
        text = await asyncio.to_thread(generate_latest, await registry_of(self._controller))
        return AdminReply(text, kind=CONTENT_TYPE_LATEST)


def read_model(body: bytes, defaults: ModelDefaults) -> ModelConfig:
    """Parse a model from JSON with the keys of the configuration's `models`, over the defaults.

    Raises:
        ApiError: 400; its message is one line that says what is wrong.
    """
    try:
        values = read_json(body.decode())
        if not isinstance(values, dict):
            raise ConfigError("the body must be a mapping")
        told = defaults.model_dump(mode="json", exclude_unset=True)
        return parse_router_config({"defaults": told, "models": [values]}).models[0]
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8: byte {error.start} is invalid"
    except ConfigError as error:
        problem = str(error).removeprefix("models[0]").lstrip(".: ")
    raise ApiError(400, problem, code="invalid_model")


def _target(body: bytes) -> str | None:
    """Return the replica in a body like ``{"to": REPLICA}``; None if it names none."""
    try:
        values = read_json(body.decode()) if body else {}
    except (UnicodeDecodeError, ConfigError):
        values = None
    target = values.get("to") if isinstance(values, dict) else 0
    if not isinstance(target, str | None):
        raise ApiError(400, 'The body must be empty or {"to": REPLICA}.', param="to")
    return target


def _change(before: ModelConfig | None, model: ModelConfig) -> str:
    if before is None:
        return "added"
    if before == model:
        return "unchanged"
    return "adjusted" if before.generation == model.generation else "restarted"


def _last(call: AdminCall) -> int:
    text = call.query.get("last", str(EVENTS_DEFAULT))
    num = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not 1 <= num <= EVENTS_MAX:
        raise ApiError(400, f"`last` must be a number from 1 to {EVENTS_MAX}.", param="last")
    return num


def _unknown(what: str, name: str) -> ApiError:
    return ApiError(404, f"There is no {what} `{name[:NAME_CHARS_MAX]}`.", code=f"{what}_not_found")


async def _send_error(send: Send, error: ApiError) -> None:
    closing: Headers = [(b"connection", b"close")] if error.closes else []
    headers = [(b"content-type", _JSON.encode()), *error.headers, *closing]
    await _send(send, error.status, error.body, headers=headers)


async def _send(send: Send, status: int, body: bytes, *, headers: Headers) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
