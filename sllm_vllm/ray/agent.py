"""The node agent as a Ray actor, and the router's view of a node through it. The only file of this package that uses
Ray.

Each node has one actor, which is pinned to it and restarted when it is killed. It holds the node's accelerators as Ray
resources, so that Ray gives them to no other work, and the agent uses none that Ray gave away. Its engines end with it,
as with any agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sllm_vllm.config import NodeConfig
from sllm_vllm.daemon.file_limit import raise_file_limit
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.daemon.unix_listener import listening, locked, make_private_directory
from sllm_vllm.errors import NodeBusy, NodeError, NodeUnavailable, SllmError
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.daemon import WORDS
from sllm_vllm.node.protocol import NodeReport, ReplicaOrder, ReplicaReport
from sllm_vllm.node.server import AgentServer
from sllm_vllm.ray.nodes import RayNodeFacts, config_there
from sllm_vllm.ray.peer_server import PeerServer
from sllm_vllm.store.transfer import pull_checkpoint

logger = logging.getLogger(__name__)

NAMESPACE = "sllm"
CALLS_MAX = 10_000
"""Concurrent calls of one actor; most of them wait for something."""
LOCK_S_MAX = 20.0
"""How long to wait for the lock of an agent that was just killed."""
PULLS_MAX = 2
"""Checkpoints pulled from other nodes at once."""
_LOCK_PAUSE_S = 0.2
_MEND_PULL = "see both nodes' logs; its engine reads the weights itself meanwhile"
_MEND = "Ray starts it again; see the actor's log"

T = TypeVar("T")


class RayAgent:
    """The actor. Its agent starts with the first call, on the actor's loop; its methods are the agent's."""

    def __init__(self, config: NodeConfig) -> None:
        log_as_actor()
        self._config = config
        self._starting: asyncio.Task[NodeAgent] | None = None
        self._held = contextlib.AsyncExitStack()
        self._peers = PeerServer(config.store_dir, config.engine_host)
        self._pulls = asyncio.Semaphore(PULLS_MAX)

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        """See ``NodeAgent``."""
        return await (await self._agent()).ensure_replica(order)

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        """See ``NodeAgent``."""
        return await (await self._agent()).stop_replica(replica_id)

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        """See ``NodeAgent``."""
        async for report in (await self._agent()).watch(replica_id):
            yield report

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        """See ``NodeAgent``; adds the URL from which other nodes can pull this node's checkpoints."""
        report = await (await self._agent()).report(with_memory=with_memory)
        return report.model_copy(update={"peer": self._peers.url})

    async def wait_warm(self, timeout_s: float) -> bool:
        """See ``NodeAgent``."""
        return await (await self._agent()).wait_warm(timeout_s)

    async def prefetch_model(self, arguments: tuple[str, ...]) -> None:
        """See ``NodeAgent``."""
        await (await self._agent()).prefetch_model(arguments)

    async def pull_checkpoint(self, url: str) -> None:
        """Copy another node's checkpoint here; at most ``PULLS_MAX`` at once, others wait.

        Raises:
            NodeError: the pull failed; no part of the checkpoint becomes visible.
        """
        await self._agent()
        async with self._pulls:
            try:
                pulled = await pull_checkpoint(url, self._config.store_dir)
            except SllmError as error:
                raise NodeError(
                    self._config.store_dir, f"a peer's checkpoint did not come: {error}", _MEND_PULL
                ) from None
        logger.info("event=pulled place=%s bytes=%d was_there=%s", pulled.place, pulled.nbytes, pulled.was_there)

    async def close(self) -> None:
        """End its engines; the caller then ends the actor."""
        if self._starting is not None:
            await asyncio.shield(self._starting)
            await self._held.aclose()

    async def _agent(self) -> NodeAgent:
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> NodeAgent:
        try:
            return await self._enter()
        except BaseException:
            await self._held.aclose()  # else the next attempt would find the folder locked by this one
            raise

    async def _enter(self) -> NodeAgent:
        """Lock the node's folder, start the agent, and serve the commands on this machine."""
        config = self._config
        raise_file_limit()
        make_private_directory(config.node_dir, WORDS)
        listener = await _entered(self._held, config)
        loops = RunLoops(lambda reason: os.kill(os.getpid(), signal.SIGTERM))
        agent = NodeAgent(config, loops=loops)
        await agent.start()
        self._held.push_async_callback(agent.close)
        server = AgentServer(agent, stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
        await server.start()
        accepting = loops.start("the agent's socket", lambda: server.accept(listener))
        self._held.push_async_callback(server.close)
        self._held.callback(accepting.cancel)
        await self._peers.start()
        self._held.push_async_callback(self._peers.close)
        return agent


async def _entered(held: contextlib.AsyncExitStack, config: NodeConfig) -> Any:  # noqa: ANN401 - a socket
    """The folder's lock and socket. Retries for a while, since the kernel releases a killed process's lock a moment
    later."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + LOCK_S_MAX
    while True:
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(locked(config.node_dir / "lock", config.socket_path, WORDS))
                listener = stack.enter_context(listening(config.socket_path, WORDS))
                held.enter_context(stack.pop_all())
                return listener
        except NodeBusy:
            if loop.time() > deadline_s:
                raise
            await asyncio.sleep(_LOCK_PAUSE_S)


class RayNode:
    """A node, through its actor, as ``router/engines.py`` uses it. Every call raises ``NodeUnavailable`` if there is no
    actor any more; a restarted one knows none of its predecessor's replicas."""

    is_here = False

    def __init__(self, name: str, actor: Any) -> None:  # noqa: ANN401 - Ray has no types
        self.name = name
        self._actor = actor

    async def ensure_replica(self, order: ReplicaOrder) -> ReplicaReport:
        """See ``NodeAgent``."""
        return await self._answer(self._actor.ensure_replica.remote(order))

    async def stop_replica(self, replica_id: str) -> ReplicaReport:
        """See ``NodeAgent``."""
        return await self._answer(self._actor.stop_replica.remote(replica_id))

    async def watch(self, replica_id: str) -> AsyncIterator[ReplicaReport]:
        """See ``NodeAgent``."""
        answers = self._actor.watch.options(num_returns="streaming").remote(replica_id)
        while True:
            try:
                reference = await anext(answers)
            except StopAsyncIteration:
                return
            except RayError as error:
                raise self._told(error) from None
            yield await self._answer(reference)

    async def report(self, *, with_memory: bool = False) -> NodeReport:
        """See ``NodeAgent``."""
        return await self._answer(self._actor.report.remote(with_memory=with_memory))

    async def wait_warm(self, timeout_s: float) -> bool:
        """See ``NodeAgent``."""
        return await self._answer(self._actor.wait_warm.remote(timeout_s))

    async def prefetch_model(self, arguments: tuple[str, ...]) -> None:
        """See ``NodeAgent``."""
        await self._answer(self._actor.prefetch_model.remote(arguments))

    async def pull_checkpoint(self, url: str) -> None:
        """See ``RayAgent``."""
        await self._answer(self._actor.pull_checkpoint.remote(url))

    async def close(self) -> None:
        """End its engines and the actor."""
        with contextlib.suppress(NodeError):
            await self._answer(self._actor.close.remote())
        ray.kill(self._actor)

    async def _answer(self, reference: Awaitable[T]) -> T:
        try:
            return await reference
        except RayError as error:
            raise self._told(error) from None

    def _told(self, error: RayError) -> NodeError:
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, NodeError):
                return error.cause
            return NodeError(self.name, f"its agent failed: {error.cause!r}", _MEND)
        return NodeUnavailable(self.name, f"its agent does not answer ({type(error).__name__})", _MEND)


def agent_on(node: RayNodeFacts, config: NodeConfig) -> RayNode:
    """The agent of a node, made if there is none. Returns at once; its first answer comes when it has started."""
    options = {
        "name": f"agent-{node.id}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": CALLS_MAX,
        "num_gpus": 0 if node.is_wide else node.num_gpus,
        "num_cpus": 0 if node.is_wide else node.num_cpus,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.host or node.id, soft=False),
    }
    there = config_there(config, node, ray.get_runtime_context().gcs_address)
    return RayNode(node.name, ray.remote(RayAgent).options(**options).remote(there))


def forget_agent(node_id: str) -> None:
    """Kill the actor of a node that has left for good; otherwise the actor would wait for the node's return."""
    with contextlib.suppress(ValueError, RayError):
        ray.kill(ray.get_actor(f"agent-{node_id}", namespace=NAMESPACE))


def log_as_actor() -> None:
    """Send log lines to the actor's own file, which Ray keeps and shows."""
    own = logging.getLogger("sllm_vllm")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
        )
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False
