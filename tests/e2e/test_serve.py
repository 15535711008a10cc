"""`vllm serve --load-format sllm`, the real command: stock vLLM's tokens, and new weights in a live engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelDir
from tests.support.vllm_server import Server, vllm_server

PROMPTS = ("hello world", "a b c d e f g", "The quick brown fox")
SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "seed": 7})


def answers(server: Server) -> list[list[int]]:
    return [server.tokens(prompt, **sampling) for prompt in PROMPTS for sampling in SAMPLINGS]


def sllm_arguments(store: Path, report: Path) -> tuple[str, ...]:
    extra = {"store_dir": str(store), "report_path": str(report), "verify": "always"}
    return "--load-format", "sllm", "--model-loader-extra-config", json.dumps(extra)


def outcome_of(report: Path) -> str:
    """What the loader did, as its report says."""
    outcome: str = json.loads(report.read_text())["outcome"]
    return outcome


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--enforce-eager",), id="eager", marks=pytest.mark.e2e),
        pytest.param((), id="compiled", marks=pytest.mark.e2e_long),
    ],
)
def test_converting_and_loading_start_answer_like_stock(
    model_dir: ModelDir, tmp_path: Path, how: tuple[str, ...]
) -> None:
    model, report = model_dir("llama"), tmp_path / "report.json"
    with vllm_server(model, tmp_path, *how) as stock:
        expected = answers(stock)
    outcomes = []
    for _ in range(2):
        with vllm_server(model, tmp_path, *how, *sllm_arguments(tmp_path / "store", report)) as ours:
            assert answers(ours) == expected
        outcomes.append(outcome_of(report))
    assert outcomes == ["converted", "loaded"]


@pytest.mark.e2e_long
def test_reload_weights_gives_a_live_engine_the_second_modelsanswers(model_dir: ModelDir, tmp_path: Path) -> None:
    first, second = model_dir("llama"), model_dir("llama", seed=1)
    report, dev_mode = tmp_path / "report.json", {"VLLM_SERVER_DEV_MODE": "1"}
    with vllm_server(second, tmp_path, *sllm_arguments(tmp_path / "store", report)) as converting:
        expected = answers(converting)
    with vllm_server(first, tmp_path, *sllm_arguments(tmp_path / "store", report), environment=dev_mode) as live:
        before = answers(live)
        live.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(second)}})
        live.post("/reset_prefix_cache", {})
        after = answers(live)
        log = live.log.read_text()
    assert before != expected
    assert after == expected
    assert "event=reload format=sllm" in log
    assert "were not loaded from checkpoint" not in log
