"""A real node agent in a test's own process: engines forked from a parent that has imported vLLM, up in a second."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_vllm.config import NodeConfig
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.engine_process import living_members
from sllm_vllm.node.protocol import ReplicaOrder, ReplicaReport
from tests.support.vllm_server import SERVER_ENVIRONMENT

WARM_MAX_S = 400.0
ARGUMENTS = ("--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M")
PROMPTS = ("hello world", "a b c d e f g")
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


@contextlib.asynccontextmanager
async def warm_agent(
    directory: Path, *, slots: int = 2, migration: bool = False, waits: bool = True
) -> AsyncIterator[NodeAgent]:
    """One whose parent is warm, or without ``waits`` imports; its folder and its store are in ``directory``."""
    libc, was_subreaper = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was_subreaper))
    config = NodeConfig(node_dir=directory / "node", store_dir=directory / "store", slots=slots, migration=migration)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")
        patch.setenv("HF_HUB_OFFLINE", "1")
        node = NodeAgent(config)
        try:
            await node.start()
            if waits:
                await warm(node)
            yield node
        finally:
            await node.close()
            libc.prctl(_PR_SET_CHILD_SUBREAPER, was_subreaper)  # another agent of this process may need it


async def warm(agent: NodeAgent) -> int:
    """Wait for a warm parent; its pid."""
    assert await agent.wait_warm(WARM_MAX_S)
    pid = (await agent.report()).warm.pid
    assert pid is not None
    return pid


def order(model: Path | str, *more: str, **fields: Any) -> ReplicaOrder:
    return ReplicaOrder(model=str(model), arguments=(*ARGUMENTS, *more), **fields)


async def watched(agent: NodeAgent, replica: str, is_so: Callable[[ReplicaReport], bool]) -> ReplicaReport:
    """The first report that is so."""
    async with asyncio.timeout(WARM_MAX_S):
        async for report in agent.watch(replica):
            if is_so(report):
                return report
    raise AssertionError(f"it ended before: {agent.replica(replica)}")


async def ready(agent: NodeAgent, wanted: ReplicaOrder) -> ReplicaReport:
    report = await agent.ensure_replica(wanted)
    report = await watched(agent, report.id, lambda report: report.is_ready or report.has_ended)
    assert report.is_ready, (report.reason, report.tail)
    return report


async def stopped(agent: NodeAgent, replica: str) -> ReplicaReport:
    session = agent.replica(replica).pid
    await agent.stop_replica(replica)
    report = await watched(agent, replica, lambda report: report.has_ended)
    assert session is None or living_members(session) == []
    return report


async def ended(agent: NodeAgent, replica: str) -> ReplicaReport:
    return await watched(agent, replica, lambda report: report.has_ended)


def post(report: ReplicaReport, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {report.api_key}"}
    request = urllib.request.Request(f"{report.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def tokens(report: ReplicaReport, prompt: str, **sampling: Any) -> list[int]:
    body = {"model": report.model, "prompt": prompt, "max_tokens": 24, "return_token_ids": True, **sampling}
    found: list[int] = post(report, "/v1/completions", body)["choices"][0]["token_ids"]
    return found


async def answers(report: ReplicaReport) -> list[list[int]]:
    return [await asyncio.to_thread(tokens, report, prompt, temperature=0) for prompt in PROMPTS]
