"""Every architecture, and two tensor-parallel ranks, through the real `vllm serve`: the answers are stock's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_models import ARCHITECTURES, POOLING_ARCHITECTURES
from tests.conftest import ModelDir
from tests.e2e.test_serve import answers, outcome_of, sllm_arguments
from tests.vllm_server import Server, vllm_server

pytestmark = pytest.mark.e2e_long

TWO_RANKS = ("--tensor-parallel-size", "2")
UNPINNED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def embedding(server: Server) -> list[float]:
    answer: list[float] = server.post("/v1/embeddings", {"model": server.model, "input": "hello"})["data"][0][
        "embedding"
    ]
    return answer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_equal(architecture: str, model_dir: ModelDir, tmp_path: Path) -> None:
    model, report = model_dir(architecture), tmp_path / "report.json"
    ask: Any = embedding if architecture in POOLING_ARCHITECTURES else answers
    with vllm_server(model, tmp_path) as stock:
        expected = ask(stock)
    outcomes = []
    for _ in range(2):
        with vllm_server(model, tmp_path, *sllm_arguments(tmp_path / "store", report)) as ours:
            assert ask(ours) == expected
        outcomes.append(outcome_of(report))
    assert outcomes == ["converted", "loaded"]


def test_two_ranks_answer_like_two_stock_ranks(model_dir: ModelDir, tmp_path: Path) -> None:
    model, report = model_dir("llama"), tmp_path / "report.json"
    with vllm_server(model, tmp_path, *TWO_RANKS, environment=UNPINNED) as stock:
        expected = answers(stock)
    outcomes = []
    for _ in range(2):
        arguments = (*TWO_RANKS, *sllm_arguments(tmp_path / "store", report))
        with vllm_server(model, tmp_path, *arguments, environment=UNPINNED) as ours:
            assert answers(ours) == expected
        outcomes.append({outcome_of(report), outcome_of(tmp_path / "report.rank-1.json")})
    assert outcomes == [{"converted"}, {"loaded"}]
