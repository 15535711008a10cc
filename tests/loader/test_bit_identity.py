"""The first truth: a module filled from our checkpoint holds, bit for bit, what the stock loader puts there."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.common.random_models import ARCHITECTURES
from tests.conftest import ModelDir
from tests.support.vllm_fill import Fill, engine_config, join_model_parallel, run_ranks, tensors_after_load_weights

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float32")


Result = tuple[list[str], list[str]]
"""The loader's outcomes, and the names of tensors that differ from stock."""


def fill_three_times(model: Path, store: Path, engine_args: dict[str, Any] | None = None) -> Result:
    """Fill a module from stock, converting, and from our checkpoint."""
    import torch

    ours = Fill(model, load_format="sllm", extra_config={"store_dir": str(store), "verify": "always"})
    ours = replace(ours, engine_args=engine_args or {})
    expected = tensors_after_load_weights(replace(ours, load_format="auto", extra_config={}))
    outcomes, differing = [], []
    for _ in range(2):
        outcome, found = _fill_and_tell(ours)
        outcomes.append(outcome)
        wait_until_written()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        differing += [name for name in expected.keys() | found.keys() if not _same(expected.get(name), found.get(name))]
    return outcomes, differing


def _fill_and_tell(fill: Fill) -> tuple[str, dict[str, torch.Tensor]]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_fill import cloned_tensors, empty_module

    config = engine_config(fill)
    join_model_parallel(config)
    module = empty_module(config)
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config):
        loader.load_weights(module, config.model_config)
    return loader.report.outcome, cloned_tensors(module)


def wait_until_written() -> None:
    """Return when the threads that write checkpoints behind are done."""
    for thread in threading.enumerate():
        if thread.name == "sllm-sync":
            thread.join()


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    import torch

    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_rank(architecture: str, dtype: str, model_dir: ModelDir, tmp_path: Path) -> None:
    outcomes, differing = fill_three_times(model_dir(architecture, dtype=dtype), tmp_path)
    assert outcomes == ["converted", "loaded"]
    assert differing == []


def fill_all(models: list[Path], store: Path, engine_args: dict[str, Any] | None = None) -> dict[str, Result]:
    """``fill_three_times`` for many models in one rank: a process takes long to start."""
    return {model.name: fill_three_times(model, store / model.name, engine_args) for model in models}


def test_two_tensor_parallel_ranks(model_dir: ModelDir, tmp_path: Path) -> None:
    models = [model_dir(architecture, dtype=dtype) for architecture in ARCHITECTURES for dtype in DTYPES]
    for results in run_ranks(fill_all, 2, models, tmp_path):
        assert results == {model.name: (["converted", "loaded"], []) for model in models}


@pytest.mark.e2e_long
def test_two_pipeline_parallel_ranks(model_dir: ModelDir, tmp_path: Path) -> None:
    models = [model_dir("llama"), model_dir("qwen3")]
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}
    for results in run_ranks(fill_all, 2, models, tmp_path, sizes):
        assert results == {model.name: (["converted", "loaded"], []) for model in models}
