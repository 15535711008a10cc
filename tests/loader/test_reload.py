"""Reloading a live module, in process: what is not packed away holds the second model's bytes afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ModelDir
from tests.loader.test_bit_identity import wait_until_written
from tests.support.vllm_fill import Fill, engine_config, join_model_parallel, load_model, tensors_after_load_weights


@pytest.mark.parametrize("is_converted", [True, False])
def test_live_tensors_hold_the_second_models_bytes(model_dir: ModelDir, tmp_path: Path, is_converted: bool) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    first, second = model_dir("llama"), model_dir("llama", seed=1)
    extra = {"store_dir": str(tmp_path)}
    if is_converted:  # else the stock iterator has to do it
        load_model(Fill(second, load_format="sllm", extra_config=extra))
        wait_until_written()
    config = engine_config(Fill(first, load_format="sllm", extra_config=extra))
    join_model_parallel(config)
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        module = loader.load_model(vllm_config=config, model_config=config.model_config)
        addresses = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
        reload_weights(config, module, None, str(second), is_checkpoint_format=True)
    wait_until_written()
    expected = tensors_after_load_weights(Fill(second))
    live = {name: tensor for name, tensor in module.named_parameters() if tensor.numel()}
    assert "model.embed_tokens.weight" in live
    assert [name for name, tensor in live.items() if not torch.equal(tensor, expected[name])] == []
    assert {name: tensor.data_ptr() for name, tensor in module.named_parameters()} == addresses
