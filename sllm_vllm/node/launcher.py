"""Starts an agent in the background, for a command that finds none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from sllm_vllm.daemon.plain_file import open_plain
from sllm_vllm.daemon.unix_listener import DaemonWords, make_private_directory
from sllm_vllm.errors import NodeError, NodeUnavailable
from sllm_vllm.node.client import NodeClient
from sllm_vllm.units import KIB, MIB

# Selects the vLLM plugins that an engine loads, so that ours for live migration is among them. Reads what is
# installed.


OURS = "sllm"
_ENDPOINTS = "vllm.endpoint_plugins"


def moving_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to the environment of engines whose requests can be moved.

    vLLM loads plugins that add routes only if ``VLLM_PLUGINS`` names them, and then it loads no other plugins than
    those named. So all plugins that it would load by default are named, too, except for those that add routes.
    """
    named = environment.get("VLLM_PLUGINS")
    names = set(named.split(",")) if named is not None else _loaded_by_themselves()
    return {"SLLM_MIGRATION": "1", "VLLM_PLUGINS": ",".join(sorted({*names, OURS} - {""}))}


def _loaded_by_themselves() -> set[str]:
    found = entry_points()
    return {
        one.name
        for group in found.groups
        if group.startswith("vllm.") and group != _ENDPOINTS
        for one in found.select(group=group)
    }


BUSY_STATUS = 3
"""Exit status of ``node serve`` where another agent has the directory: no failure for a client that accepts any
agent."""
START_S = 30.0
LOG_NBYTES_MAX = 4 * MIB
"""A longer log is emptied when an agent starts."""
TAIL_LINES = 20
_TAIL_NBYTES = 16 * KIB
_POLL_S = 0.05
_AGAIN_S = 1.0
_WORDS = DaemonWords(NodeError, NodeError, "", "make it writable, or give another --node-dir", "")


def serve_command(options: Sequence[str]) -> list[str]:
    """The command line of ``sllm-vllm node serve`` in this same installation."""
    program = Path(sys.executable).with_name("sllm-vllm")
    if program.exists():
        return [sys.executable, str(program), "node", "serve", *options]
    return [sys.executable, "-c", "from sllm_vllm.cli.main import main; main()", "node", "serve", *options]


def start_in_background(node_dir: Path, command: Sequence[str], *, start_s: float = START_S) -> NodeClient:
    """Start an agent that outlives this process and its terminal, and wait until it answers.

    If other processes start one at the same time, one of them survives, and this returns its client.

    Args:
        command: runs the agent on ``node_dir``, as ``serve_command`` gives it.

    Raises:
        NodeUnavailable: it ended, or does not answer in time; includes the end of its log.
        NodeError: the folder or the log can't be used.
    """
    make_private_directory(node_dir, _WORDS)
    log, client = node_dir / "agent.log", NodeClient(node_dir / "socket")
    deadline_s = time.monotonic() + start_s
    process, ended_s = _start(command, log), 0.0
    while not client.is_there():
        now_s, status = time.monotonic(), process.poll()
        if now_s > deadline_s:
            raise _unavailable(client, log, f"no agent answers after {start_s:.0f} s")
        if status is not None and status != BUSY_STATUS:
            raise _unavailable(client, log, f"the agent ended at once (exit status {status})")
        if status == BUSY_STATUS:  # another agent is starting, or about to end
            ended_s = ended_s or now_s
            if now_s - ended_s > _AGAIN_S:
                process, ended_s = _start(command, log), 0.0
        time.sleep(_POLL_S)
    return client


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    try:
        output = open_plain(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        try:
            os.fchmod(output, 0o600)
            if os.fstat(output).st_size > LOG_NBYTES_MAX:
                os.ftruncate(output, 0)
            return subprocess.Popen(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        finally:
            os.close(output)
    except OSError as error:
        raise NodeError(
            log, f"no agent can be started ({error.strerror})", "mend it, or give another --node-dir"
        ) from None


def _unavailable(client: NodeClient, log: Path, problem: str) -> NodeUnavailable:
    """The error, with the end of the agent's log, which says why."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_NBYTES))
        lines = file.read(_TAIL_NBYTES).decode(errors="replace").splitlines()[-TAIL_LINES:]
    told = "".join(f"\n  {line}" for line in lines)
    return NodeUnavailable(client.socket_path, problem, f"see {log}{told}")
