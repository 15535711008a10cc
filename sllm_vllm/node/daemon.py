"""The agent's process: one a directory, from its lock to its last engine's end. ``sllm-vllm node serve`` calls it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable

from sllm_vllm.config import NodeConfig
from sllm_vllm.errors import NodeBusy, NodeError
from sllm_vllm.node.server import Agent, Server
from sllm_vllm.unix_listener import DaemonWords, listening, locked, make_private_directory

logger = logging.getLogger(__name__)

WORDS = DaemonWords(
    error=NodeError,
    busy=NodeBusy,
    busy_problem="another agent is running",
    directory_mend="make it writable, or give another --node-dir",
    socket_mend="give another --node-dir",
)

MakeAgent = Callable[[NodeConfig], Agent]


def serve(config: NodeConfig, make_agent: MakeAgent | None = None) -> int:
    """Run the agent until SIGTERM, SIGINT or the order to stop; its engines end with it. Returns the exit status.

    Args:
        make_agent: called on the agent's loop; ``NodeAgent`` by itself.

    Raises:
        NodeBusy: another agent has the directory. NodeError: the socket can't be made.
    """
    make_private_directory(config.node_dir, WORDS)
    with locked(config.node_dir / "lock", config.socket_path, WORDS), listening(config.socket_path, WORDS) as listener:
        asyncio.run(_run(config, listener, make_agent or _node_agent))
    return 0


def _node_agent(config: NodeConfig) -> Agent:
    from sllm_vllm.node.agent import NodeAgent  # tests serve another

    return NodeAgent(config)


async def _run(config: NodeConfig, listener: socket.socket, make_agent: MakeAgent) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    agent = make_agent(config)
    server = Server(agent, stop=stopped.set)
    await agent.start()
    try:
        await server.start()
        logger.info("event=agent_serving socket=%s", config.socket_path)
        await _serve_until(stopped, server, listener)
    finally:
        await agent.close()  # first: whoever watches a replica is told of its end
        await server.close()
    logger.info("event=agent_stopped socket=%s", config.socket_path)


async def _serve_until(stopped: asyncio.Event, server: Server, listener: socket.socket) -> None:
    """Accept connections until told to stop; those that are there stay."""
    accepting = asyncio.create_task(server.serve(listener))
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait([accepting, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (accepting, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await accepting  # an error of it is the daemon's
