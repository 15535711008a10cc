"""The loader under ``ray.serve.llm``: its configuration of an engine becomes one that our loader fills.

Ray pins a vLLM of its own for it (0.29.0 of Ray 2.60); here it meets the one that is installed. Skipped where the extra
`ray[llm]` is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelDir

llm = pytest.importorskip("ray.serve.llm", exc_type=ImportError)


def initialization_of(model: Path, store: Path) -> dict[str, Any]:
    """What `ray.serve.llm` hands to vLLM's engine for a user's configuration."""
    config = llm.LLMConfig(
        model_loading_config={"model_id": "m", "model_source": str(model)},
        engine_kwargs={"load_format": "sllm", "model_loader_extra_config": {"store_dir": str(store)}},
    )
    told: dict[str, Any] = config.get_engine_config().get_initialization_kwargs()
    return told


def test_its_engine_gets_our_loader(model_dir: ModelDir, tmp_path: Path) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_fill import empty_module, join_model_parallel, look_at_models_here

    look_at_models_here()
    told = initialization_of(model_dir("llama"), tmp_path / "store")
    assert told["load_format"] == "sllm"
    del told["distributed_executor_backend"]  # "ray", which vLLM has for GPUs alone
    config = AsyncEngineArgs(**told, enforce_eager=True, max_model_len=256).create_engine_config()
    join_model_parallel(config)
    module = empty_module(config)
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config):
        loader.load_weights(module, config.model_config)
    assert type(loader).__name__ == "SllmModelLoader"
    assert loader.report.outcome == "converted"
