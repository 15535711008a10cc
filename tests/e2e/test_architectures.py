"""Every architecture, and two tensor-parallel ranks, through real engines: the answers are those of the stock loader.

Engines are forked from a warm parent. That a plain `vllm serve` answers the same is `test_serve.py`'s and
`test_node.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.common.random_models import ARCHITECTURES, POOLING_ARCHITECTURES
from sllm_vllm.node.agent import NodeAgent
from sllm_vllm.node.protocol import ReplicaReport
from tests.conftest import ModelDir
from tests.e2e.real_agent import order, post, ready, stopped, tokens, warm_agent
from tests.e2e.test_serve import PROMPTS, SAMPLINGS, outcome_of, sllm_arguments

pytestmark = [pytest.mark.e2e_long, pytest.mark.asyncio(loop_scope="module")]

STOCK = ("--load-format", "auto")
TWO_RANKS = ("--tensor-parallel-size", "2")
UNPINNED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NodeAgent]:
    async with warm_agent(tmp_path_factory.mktemp("architectures")) as node:
        yield node


def asked(report: ReplicaReport) -> Any:
    """Token ids of completions; of a pooling model an embedding."""
    if any(name in report.model for name in POOLING_ARCHITECTURES):
        return post(report, "/v1/embeddings", {"model": report.model, "input": "hello"})["data"][0]["embedding"]
    return [tokens(report, prompt, **sampling) for prompt in PROMPTS for sampling in SAMPLINGS]


async def answers_of(agent: NodeAgent, model: Path, *arguments: str, **fields: Any) -> Any:
    """Of an engine that is started for them."""
    report = await ready(agent, order(model, *arguments, **fields))
    assert report.start is not None
    assert report.start.is_warm, report.start.cold_reason
    found = await asyncio.to_thread(asked, report)
    await stopped(agent, report.id)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_answers_are_equal(agent: NodeAgent, architecture: str, model_dir: ModelDir, tmp_path: Path) -> None:
    model, report = model_dir(architecture), tmp_path / "report.json"
    expected = await answers_of(agent, model, *STOCK)
    outcomes = []
    for _ in range(2):
        assert await answers_of(agent, model, *sllm_arguments(tmp_path / "store", report)) == expected
        outcomes.append(outcome_of(report))
    assert outcomes == ["converted", "loaded"]


async def test_two_ranks_answer_like_two_stock_ranks(agent: NodeAgent, model_dir: ModelDir, tmp_path: Path) -> None:
    model, report = model_dir("llama"), tmp_path / "report.json"
    expected = await answers_of(agent, model, *TWO_RANKS, *STOCK, environment=UNPINNED)
    outcomes = []
    for _ in range(2):
        arguments = (*TWO_RANKS, *sllm_arguments(tmp_path / "store", report))
        assert await answers_of(agent, model, *arguments, environment=UNPINNED) == expected
        outcomes.append({outcome_of(report), outcome_of(tmp_path / "report.rank-1.json")})
    assert outcomes == [{"converted"}, {"loaded"}]
