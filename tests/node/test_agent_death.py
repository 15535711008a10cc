"""Agents that are killed: their engines end, all of them, by the death watch or by the next agent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllm_vllm.daemon.unix_listener import socket_of_url
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.orphans import find_process
from tests.node.agent_bench import ask, node_config, running_agent
from tests.support.waiting import wait_until

_AGENT = """
import asyncio, sys
from sllm_vllm.config import NodeConfig
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.protocol import ReplicaOrder

async def main():
    agent = NodeAgent(NodeConfig.model_validate_json(sys.argv[1]))
    await agent.start()
    for _ in range(2):
        ordered = await agent.ensure_replica(ReplicaOrder(model="/models/family", takes_socket=True))
        async for report in agent.watch(ordered.id):
            if report.is_ready:
                print(report.pid, report.url, flush=True)
                break
    print(agent._death_watch.pid, flush=True)
    await asyncio.sleep(900)

asyncio.run(main())
"""


class Agent:
    """An agent in a process of its own, with two engines of three processes each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        told = [process.stdout.readline().split() for _ in range(3)]
        self.engines = [int(words[0]) for words in told[:2]]
        self.sockets = [socket_of_url(words[1]) or "" for words in told[:2]]
        self.watch = int(told[2][0])

    @property
    def living(self) -> list[int]:
        return [pid for engine in self.engines for pid in living_members(engine)]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    command = [sys.executable, "-c", _AGENT, node_config(tmp_path, engine_sockets=True).model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        running = None
        try:
            running = Agent(process)
            yield running
        finally:
            process.kill()
            for pid in running.living if running is not None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    process = find_process(pid)
    return process is not None and not process.is_ended


def test_of_an_agent_that_is_killed_nothing_is_left(agent: Agent) -> None:
    assert len(agent.living) == 6
    assert is_alive(agent.watch)
    agent.process.kill()
    wait_until(lambda: not agent.living, "the engines to end")
    wait_until(lambda: not is_alive(agent.watch), "the death watch to end")


def kill_with_its_watch(agent: Agent) -> None:
    os.kill(agent.process.pid, signal.SIGSTOP)  # it would start another watch
    os.kill(agent.watch, signal.SIGKILL)
    wait_until(lambda: not is_alive(agent.watch), "the death watch to end")
    agent.process.kill()
    wait_until(lambda: not any(map(is_alive, agent.engines)), "the kernel to end the engines' first processes")


async def test_what_an_agent_and_its_watch_left_behind_is_ended_by_the_next_agent(agent: Agent, tmp_path: Path) -> None:
    assert len(agent.sockets) == 2
    kill_with_its_watch(agent)
    assert len(agent.living) == 4
    async with running_agent(tmp_path) as bench:
        assert agent.living == []
        assert not any(map(os.path.lexists, agent.sockets))
        assert (await ask(await bench.ready(), "/v1/models"))[0] == 200


def children_of(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_a_death_watch_that_is_killed_is_replaced(agent: Agent) -> None:
    before = children_of(agent.process.pid)
    os.kill(agent.watch, signal.SIGKILL)
    wait_until(lambda: children_of(agent.process.pid) - before, "another death watch")
    agent.process.kill()
    wait_until(lambda: not agent.living, "the engines to end")
