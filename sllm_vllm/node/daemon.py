"""The agent's process, one for each folder, from taking the lock to the last engine's end. Run by ``sllm-vllm node
serve``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from sllm_vllm.config import NodeConfig, default_node_dir
from sllm_vllm.daemon.ending import Ending, Stopped
from sllm_vllm.daemon.file_limit import connections_within, raise_file_limit
from sllm_vllm.daemon.run_loops import RunLoops
from sllm_vllm.daemon.unix_listener import DaemonWords, listening, locked, make_private_directory
from sllm_vllm.errors import NodeBusy, NodeError
from sllm_vllm.node.client import NodeClient
from sllm_vllm.node.server import CONNECTIONS_MAX, Agent, AgentServer

logger = logging.getLogger(__name__)

WORDS = DaemonWords(
    error=NodeError,
    busy=NodeBusy,
    busy_problem="another agent is running",
    directory_mend="make it writable, or give another --node-dir",
    socket_mend="give another --node-dir",
)

CLOSE_S_MAX = 60.0
"""Longest time from SIGTERM until the process is gone, on top of the time that engines get."""
BASE_DESCRIPTORS = 28
"""Descriptors of an agent beside engines and connections: its loop, lock, socket, warm parent, death watch, libraries,
and the files and store connections that it opens for a moment."""
ENGINE_DESCRIPTORS = 8
"""Descriptors of one engine: its process, the spare ones to end it, its output, log, port and health."""
ASK_S = 5.0
"""Longest wait for the running agent's description of itself."""
ENGINES_SHOWN_MAX = 8

MakeAgent = Callable[[NodeConfig], Agent]


def serve(config: NodeConfig, make_agent: MakeAgent | None = None) -> int:
    """Run the agent until SIGTERM, SIGINT or a stop request; its engines end with it. Returns the exit status.

    Args:
        make_agent: called on the agent's loop instead of ``NodeAgent``.

    Raises:
        NodeBusy: another agent has the directory. NodeError: the socket can't be made.
        ConfigError: a setting is wrong, or the process may open too few files.
        DaemonFailed: a part of the daemon has failed for good.
    """
    raise_file_limit()
    make_private_directory(config.node_dir, WORDS)
    with locked_node(config.node_dir), listening(config.socket_path, WORDS) as listener:
        asyncio.run(_run(config, listener, make_agent))
    return 0


@contextlib.contextmanager
def locked_node(node_dir: Path) -> Iterator[None]:
    """Hold an agent's folder for this process alone while the context lasts.

    Raises:
        NodeBusy: another agent has it; the message names that agent, its engines, and the command that ends it.
        NodeError: the folder can't be used.
    """
    socket_path = node_dir / "socket"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(node_dir / "lock", socket_path, WORDS))
        except NodeBusy:
            raise _who_is_there(socket_path) from None
        yield


def _who_is_there(socket_path: Path) -> NodeBusy:
    """The error that describes the agent that has the folder, and the command that ends it."""
    at = "" if socket_path.parent == default_node_dir().expanduser().absolute() else f" --node-dir {socket_path.parent}"
    command = f"`sllm-vllm node stop{at}`"
    try:
        report = NodeClient(socket_path, timeout_s=ASK_S).report()
    except NodeError:  # it is starting or ending, or does not answer
        return NodeBusy(socket_path, WORDS.busy_problem, f"stop it first: {command} ends it and its engines")
    living = [f"{one.id} ({one.state})" for one in report.replicas if not one.has_ended]
    more = f" and {len(living) - ENGINES_SHOWN_MAX} more" if len(living) > ENGINES_SHOWN_MAX else ""
    engines = f"the engines {', '.join(living[:ENGINES_SHOWN_MAX])}{more}" if living else "no engine"
    problem = f"{WORDS.busy_problem} (process {report.pid})"
    return NodeBusy(socket_path, problem, f"stop it first: {command} ends it, and with it {engines}")


def descriptors_kept(num_slots: int) -> int:
    """Descriptors that the agent needs beside its clients' connections, with an engine in each slot and one more
    starting."""
    return BASE_DESCRIPTORS + ENGINE_DESCRIPTORS * (num_slots + 1)


async def _run(config: NodeConfig, listener: socket.socket, make_agent: MakeAgent | None) -> None:
    ending = Ending(within_s=config.stop_s + CLOSE_S_MAX)
    loops = RunLoops(ending.fail)
    agent = make_agent(config) if make_agent is not None else _node_agent(config, loops)
    with contextlib.suppress(Stopped):
        with ending.starting():
            await agent.start()
        try:
            async with served(agent, listener, ending=ending, loops=loops):
                logger.info("event=agent_serving socket=%s", config.socket_path)
                await ending.wait()
                await agent.close()  # inside `served`, so that clients that watch a replica see its end
        finally:
            await agent.close()
    logger.info("event=agent_stopped socket=%s", config.socket_path)
    ending.check()


def _node_agent(config: NodeConfig, loops: RunLoops) -> Agent:
    from sllm_vllm.node.agent import NodeAgent  # imported here, as tests serve another agent

    return NodeAgent(config, loops=loops)


@contextlib.asynccontextmanager
async def served(agent: Agent, listener: socket.socket, *, ending: Ending, loops: RunLoops) -> AsyncIterator[None]:
    """Answer on the agent's socket while the context lasts.

    Raises:
        ConfigError: the process may open too few files.
    """
    limit, kept = raise_file_limit(), descriptors_kept(agent.num_slots)
    server = AgentServer(agent, stop=ending.stop, connections_max=connections_within(limit, CONNECTIONS_MAX, kept=kept))
    await server.start()
    accepting = loops.start("the agent's socket", lambda: server.accept(listener))
    try:
        yield
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await server.close()
