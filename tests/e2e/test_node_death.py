"""An agent that is killed takes its real engines with it: a forked one, and a cold one whose processes vLLM spawned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sllm_vllm.config import child_environment
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.orphans import all_processes
from tests.conftest import ModelDir
from tests.support.vllm_server import SERVER_ENVIRONMENT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.e2e_long

_AGENT = """
import asyncio, json, sys
from pathlib import Path
from sllm_vllm.config import NodeConfig
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.protocol import ReplicaOrder

ARGUMENTS = ("--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M")

async def main(directory, model):
    agent = NodeAgent(NodeConfig(node_dir=directory / "node", store_dir=directory / "store", slots=2))
    await agent.start()
    assert await agent.wait_warm(150)
    found = {}
    for environment in ({}, {"VLLM_LOGGING_LEVEL": "INFO"}):
        report = await agent.ensure_replica(ReplicaOrder(model=model, arguments=ARGUMENTS, environment=environment))
        async for report in agent.watch(report.id):
            if report.is_ready or report.has_ended:
                break
        assert report.is_ready, report.tail
        found["warm" if report.start.is_warm else "cold"] = report.pid
    found["parent"] = (await agent.report()).warm.pid
    print(json.dumps(found), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


def test_no_engine_outlives_a_killed_agent(model_dir: ModelDir, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    environment = child_environment(**SERVER_ENVIRONMENT, HF_HUB_OFFLINE="1")
    del environment["VLLM_CPU_KVCACHE_SPACE"]
    command = [sys.executable, "-c", _AGENT, str(tmp_path), str(model_dir("llama"))]
    shared = set(os.listdir("/dev/shm"))
    with (tmp_path / "agent.log").open("wb") as log:
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True)
    assert agent.stdout is not None
    try:
        line = agent.stdout.readline()
        assert line, (tmp_path / "agent.log").read_text()
        found = json.loads(line)
        assert found.keys() == {"warm", "cold", "parent"}
        members = {pid for leader in found.values() for pid in living_members(leader)}
        assert len(members) >= 7  # of each engine three, and the parent
        start_s = time.monotonic()
        agent.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(living_members(leader) for leader in found.values()), "the end of all engines")
        print(f"{len(members)} processes were gone after {time.monotonic() - start_s:.2f} s")
        assert not members & {process.pid for process in all_processes() if not process.is_ended}
        wait_until(lambda: {one for one in os.listdir("/dev/shm") if one not in shared} == set(), "shared memory to go")
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
