"""The controller as a detached Ray actor, one per cluster, restarted when it is killed. Owns the core's process.

It adds the nodes that Ray knows, accepts ingresses, and stores what must outlive it. After a restart it learns from
agents what runs, from ingresses what they stream, and from its store what is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.errors import ConfigError, NodeError
from sllm_vllm.ray.agent import RayNode, agent_on, forget_agent, log_as_actor
from sllm_vllm.ray.nodes import RayNodeFacts, nodes_for_agents
from sllm_vllm.ray.session import Answer, Held, News, Note, SessionWelcome, Unknown
from sllm_vllm.ray.sessions import GateService
from sllm_vllm.ray.state import RayStore
from sllm_vllm.router.admin.app import AdminApp, Reloaded
from sllm_vllm.router.config.file import compare, parse_router_config, read_key_digests
from sllm_vllm.router.config.sections import RouterConfig
from sllm_vllm.router.configured import ConfiguredController
from sllm_vllm.router.core.estimator import Estimator
from sllm_vllm.router.core.facts import RequestFacts
from sllm_vllm.router.gate import Failure, Ticket
from sllm_vllm.router.http.deadline import Message
from sllm_vllm.router.state.store import StateError, StateStore, open_state_store

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Pause between two looks at the cluster."""
RETURN_S = 3.0
"""After a restart, how long ingresses have to reconnect before nodes join."""
JOIN_S_MAX = 20.0
"""How long the present nodes have to join before tickets are given without them."""
SAVE_S = 60.0
_LIFE, _ESTIMATES = "life", "estimates"


class RayController:
    """The actor. The first call starts everything, on the actor's loop; see ``ControllerLink`` for the calls.

    Args:
        told: the configuration as JSON, with digests instead of keys.
        directory: the engines' working directory, on every node.
        version: of the configuration; one with a higher version replaces it.
    """

    def __init__(self, told: str, directory: str, version: float) -> None:
        log_as_actor()
        self._config = read_told(told)
        self._directory = Path(directory)
        self._version = version
        self._starting: asyncio.Task[GateService] | None = None
        self._nodes: dict[str, RayNode] = {}
        """Nodes that have joined, by Ray's id."""
        self._names: dict[str, str] = {}
        """Ray's id of a node, by the node's name."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._alone_since_s: float | None = None
        self._loops = RunLoops(_end_process)
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._saved_s = time.monotonic()

    async def enter(self, ingress: str, held: Sequence[Held]) -> SessionWelcome:
        """See ``ControllerLink``."""
        return await (await self._service()).enter(ingress, held)

    async def acquire(self, ingress: str, facts: RequestFacts) -> Answer:
        """See ``ControllerLink``."""
        return await (await self._service()).acquire(ingress, facts)

    async def retry(self, ingress: str, ticket: Ticket, *, facts: RequestFacts, failure: Failure) -> Answer:
        """See ``ControllerLink``."""
        return await (await self._service()).retry(ingress, ticket, facts=facts, failure=failure)

    async def note(self, ingress: str, notes: Sequence[Note]) -> bool:
        """See ``ControllerLink``."""
        return await (await self._service()).note(ingress, notes)

    async def poll(self, ingress: str, version: int) -> News | Unknown:
        """See ``ControllerLink``."""
        return await (await self._service()).poll(ingress, version)

    async def configure(self, told: str, version: float) -> str:
        """Apply a newer configuration, as a reload on one machine does. Returns why it can't, or an empty string."""
        service = await self._service()
        if version <= self._version:
            return ""
        config = await asyncio.to_thread(read_told, told)
        try:
            changes = await asyncio.to_thread(compare, self._config, config)
            changes.require_live()
        except ConfigError as error:
            return str(error)
        self._config, self._version = config, version
        await self._served.apply(config, changes)
        self._admin.set_defaults(config.defaults)
        self._admin.set_keys(_admin_digests(config))
        self._admin.set_scrape_keys(read_key_digests(config.keys.metrics, "keys.metrics"))
        service.set_settings(config.ingress_settings(_client_digests(config)))
        return ""

    async def admin(self, scope: Message, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Handle an operator's request, given its ASGI scope and its body. Returns status, headers and body."""
        await self._service()
        sent: list[Message] = []
        pieces = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for piece in pieces:
                return piece
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        await self._admin(scope, receive, send)
        return sent[0]["status"], sent[0]["headers"], b"".join(one.get("body", b"") for one in sent[1:])

    # ------------------------------------------------------------------------------------------------------ lifecycle

    async def _service(self) -> GateService:
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> GateService:
        config = self._config
        self._store = _store_of(config)
        was_there = await self._store.get(_LIFE) is not None
        await self._store.put(_LIFE, b"1")
        self._served = served = ConfiguredController(
            config,
            self._store,
            directory=self._directory,
            estimator=await self._estimator(),
            holders_max=config.ray.copies,
        )
        self._controller = controller = served.controller
        await served.deploy()
        await controller.start(self._loops)
        service = GateService(controller, config.ingress_settings(_client_digests(config)), clock=time.monotonic)
        self._admin = AdminApp(controller, key_digests=_admin_digests(config), reload=_no_reload, keep=served.kept.keep)
        self._admin.set_defaults(config.defaults)
        self._admin.set_scrape_keys(read_key_digests(config.keys.metrics, "keys.metrics"))
        loop = asyncio.get_running_loop()
        first_s = loop.time() + (RETURN_S if was_there else 0.0)
        self._loops.start("nodes of the cluster", lambda: self._follow_cluster(service, first_s=first_s))
        self._loops.start("keeping house", lambda: self._keep_house(service))
        logger.info("event=controller_started models=%d was_there=%s", len(controller.models), was_there)
        return service

    async def _estimator(self) -> Estimator:
        told = await self._store.get(_ESTIMATES)
        try:
            return Estimator() if told is None else Estimator.from_record(json.loads(told))
        except ValueError as error:
            logger.warning("event=estimates_lost reason=%r", str(error))
            return Estimator()

    async def _follow_cluster(self, service: GateService, *, first_s: float) -> None:
        """Have new nodes join, and drop those that have gone: one step of a run loop, from ``first_s`` on."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, first_s - loop.time()))
        found = {node.id: node for node in await self._look()}
        for node_id in [known for known in self._nodes if known not in found]:
            self._gone(node_id)
        for node in found.values():
            if node.id not in self._nodes and node.id not in self._joining:
                self._joining[node.id] = self._in_background(self._join(node, service))
        self._joining = {node_id: task for node_id, task in self._joining.items() if not task.done()}
        if found.keys() <= self._nodes.keys() or loop.time() > first_s + JOIN_S_MAX:
            service.open()  # not earlier: what runs on nodes that have not joined would be started again elsewhere
        await asyncio.sleep(LOOK_S)

    async def _look(self) -> list[RayNodeFacts]:
        told = await asyncio.to_thread(ray.nodes)
        section = self._config.ray
        return nodes_for_agents(told, resource=section.resource, wide_resource=section.wide_resource)

    async def _join(self, node: RayNodeFacts, service: GateService) -> None:
        agent = await asyncio.to_thread(agent_on, node, self._config.node_config())
        try:
            await self._controller.add_node(
                node.name, agent, service.held_by_replica, on_lost=lambda: self._lost(node.name)
            )
        except NodeError as error:
            logger.warning("event=join_failed node=%s reason=%s", node.name, error)
            return
        self._nodes[node.id], self._names[node.name] = agent, node.id
        logger.info("event=node_joined node=%s address=%s", node.name, node.address)

    def _gone(self, node_id: str) -> None:
        """Drop a node that Ray says is gone."""
        name = self._nodes.pop(node_id).name
        self._names.pop(name, None)
        self._controller.lose_node(name, "it has left the cluster")
        self._in_background(asyncio.to_thread(forget_agent, node_id))

    def _lost(self, name: str) -> None:
        """Forget a node whose agent did not answer. If the node still exists, it joins again with its next agent."""
        node_id = self._names.pop(name, None)
        if node_id is not None:
            self._nodes.pop(node_id, None)

    async def _keep_house(self, service: GateService) -> None:
        """Drop silent ingresses, save regularly, and end if no ingress is left for long: one step of a run loop."""
        await asyncio.sleep(LOOK_S)
        service.sweep()
        if time.monotonic() - self._saved_s > SAVE_S:
            self._saved_s = time.monotonic()
            await self._save_estimates()
        if service.num_ingresses:
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = time.monotonic()
        elif time.monotonic() - self._alone_since_s > self._config.ray.linger:
            logger.info("event=controller_ends reason='no ingress is left'")
            await self._end()

    async def _end(self) -> None:
        """End all engines and agents, save what was learned, and kill this actor."""
        me = ray.get_runtime_context().current_actor
        await self._save_estimates()
        await self._controller.close()
        await asyncio.gather(*(node.close() for node in self._nodes.values()), return_exceptions=True)
        ray.kill(me)

    async def _save_estimates(self) -> None:
        try:
            await self._store.put(_ESTIMATES, json.dumps(self._controller.core.estimator.to_record()).encode())
        except StateError as error:
            logger.warning("event=estimates_not_written reason=%s", error)

    def _in_background(self, work: Any) -> asyncio.Task[None]:  # noqa: ANN401 - a coroutine of any result
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("event=task_failed", exc_info=error)


def _end_process(reason: str) -> None:
    """Exit. Ray restarts the actor, which then learns from agents and ingresses what runs."""
    os._exit(1)


def read_told(told: str) -> RouterConfig:
    """Return the configuration that ``link_of`` wrote as JSON."""
    return parse_router_config(json.loads(told), is_merged=True)


def _client_digests(config: RouterConfig) -> tuple[str, ...]:
    return read_key_digests(config.keys.clients, "keys.clients")


def _admin_digests(config: RouterConfig) -> tuple[str, ...]:
    return read_key_digests(config.keys.admin, "keys.admin")


def _store_of(config: RouterConfig) -> StateStore:
    return RayStore() if config.ray.state.startswith("ray:") else open_state_store(config.ray.state)


async def _no_reload() -> Reloaded:
    raise ConfigError("the file is read where the application is deployed from: deploy it again with `serve`")
