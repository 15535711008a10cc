"""The router as a Ray Serve application: `serve run sllm_vllm.ray.serve:app`, or `:build` with arguments.

Ingress replicas hold clients' connections and stream from engines directly; they ask the one controller which engine
to use. Keys are read where the application is built; the cluster gets only their digests.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sllm_vllm.config import router_config_path
from sllm_vllm.errors import ConfigError
from sllm_vllm.ray.agent import NAMESPACE
from sllm_vllm.ray.app import RemoteApp
from sllm_vllm.ray.controller import RayController, read_told
from sllm_vllm.ray.session import Answer, ControllerGone, Held, News, Note, SessionWelcome, Unknown
from sllm_vllm.router.config.file import read_key_digests, read_router_config
from sllm_vllm.router.config.sections import KeySource, RouterConfig
from sllm_vllm.router.config.values import needs_keys
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, Ticket
from sllm_vllm.router.http.deadline import Message

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONTROLLER = "controller"
CALLS_MAX = 100_000
"""Concurrent calls to the controller; nearly all of them wait for an engine."""
_HEAD = "node:__internal_head__"
"""A resource that only Ray's head node has."""


class Arguments(BaseModel):
    """Arguments of ``build``, as in `serve run sllm_vllm.ray.serve:build config=router.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | None = Field(
        default=None, description="path of the router's configuration; default: SLLM_ROUTER_CONFIG"
    )


class RayLink:
    """An ingress's link to the controller's actor, which it creates if there is none.

    Args:
        told: the configuration as JSON; ``version`` says which of two is newer.
    """

    def __init__(self, told: str, directory: str, version: float) -> None:
        self._made_of = (told, directory, version)
        self._actor: Any = None

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """See ``ControllerLink``. Looks the actor up again: the last one may have ended for good."""
        told, _, version = self._made_of
        try:
            self._actor = controller_actor(*self._made_of)
        except (RayError, ValueError) as error:
            raise ControllerGone(str(error)) from None
        if problem := await self._answer(self._actor.configure.remote(told, version)):
            logger.error("event=configuration_refused reason=%r", problem)
        return await self._answer(self._actor.enter.remote(ingress, held))

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """See ``ControllerLink``."""
        return await self._answer(self._actor.acquire.remote(ingress, facts))

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """See ``ControllerLink``."""
        return await self._answer(self._actor.retry.remote(ingress, ticket, facts=facts, failure=failure))

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """See ``ControllerLink``."""
        return await self._answer(self._actor.note.remote(ingress, notes))

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """See ``ControllerLink``."""
        return await self._answer(self._actor.poll.remote(ingress, version))

    async def admin(self, scope: Message, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Pass an operator's request on. Returns status, headers and body."""
        return await self._answer(self._actor.admin.remote(scope, body))

    async def _answer(self, reference: Awaitable[T]) -> T:
        try:
            return await reference
        except RayTaskError as error:
            raise ControllerGone(f"it failed: {error.cause!r}") from None
        except RayError as error:
            raise ControllerGone(type(error).__name__) from None


def controller_actor(told: str, directory: str, version: float) -> Any:  # noqa: ANN401 - Ray has no types
    """The cluster's controller. Placed on the head node if possible: without that, the cluster is lost anyway."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    options = {
        "name": CONTROLLER,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": CALLS_MAX,
        "num_cpus": 0,
        **({"scheduling_strategy": NodeAffinitySchedulingStrategy(heads[0], soft=True)} if heads else {}),
    }
    return ray.remote(RayController).options(**options).remote(told, directory, version)


def link_of(config: str) -> tuple[str, str, float]:
    """Arguments of ``RayLink`` for the configuration in a file.

    Raises:
        ConfigError: the file is wrong, or has no keys without allowing that explicitly.
    """
    path = Path(config).absolute()
    told = _with_digests(read_router_config(path)).model_dump_json(exclude_defaults=True)
    return told, str(path.parent), time.time()


def build(arguments: Arguments) -> serve.Application:
    """The Serve application for a configuration, for `serve run`, `serve build` and `serve deploy`.

    Raises:
        ConfigError: there is no configuration, it is wrong, or it has no keys without allowing that explicitly.
    """
    said = arguments.config or router_config_path()
    if said is None:
        raise ConfigError("no configuration: give config=FILE to :build, or set SLLM_ROUTER_CONFIG")
    link = link_of(said)
    config = read_told(link[0])

    def make_app() -> RemoteApp:
        return RemoteApp(RayLink(*link), name=f"{os.uname().nodename}-{uuid.uuid4().hex[:12]}")

    @serve.ingress(make_app)
    class SllmIngress:
        """Serves clients' connections."""

    deployment = serve.deployment(
        SllmIngress,
        name="sllm-ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.server.requests_max,
        graceful_shutdown_timeout_s=30.0,
        autoscaling_config={
            "min_replicas": config.ray.ingress_min,
            "max_replicas": max(config.ray.ingress_min, config.ray.ingress_max),
            "target_ongoing_requests": config.ray.ingress_ongoing,
        },
    )
    return deployment.bind()


def _with_digests(config: RouterConfig) -> RouterConfig:
    """The same configuration, with digests instead of keys."""
    digests = {
        which: tuple(KeySource(sha256=one) for one in read_key_digests(getattr(config.keys, which), f"keys.{which}"))
        for which in ("clients", "admin", "metrics")
    }
    if needs_keys(None, has_keys=bool(digests["clients"]), is_insecure=config.keys.insecure_no_keys):
        raise ConfigError("no access is configured: set `keys.clients` or `keys.insecure_no_keys: true`")
    hidden = config.keys.secret_variables()  # they may be set on the agents' machines, too
    keys = config.keys.model_copy(update={**digests, "hidden_variables": hidden})
    return config.model_copy(update={"keys": keys})


def __getattr__(name: str) -> Any:  # noqa: ANN401 - as modules have it
    """Build ``app`` when it is accessed, so that an import reads no file."""
    if name == "app":
        return build(Arguments())
    raise AttributeError(name)
