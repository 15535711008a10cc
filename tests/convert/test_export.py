"""Export and back on real vLLM: the exported directory, loaded by the stock loader, fills the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.convert.export import export_checkpoint
from sllm_vllm.convert.tensorizer_file import read_tensorizer
from sllm_vllm.errors import NotExportable, WriteError
from sllm_vllm.units import MIB
from tests.conftest import ModelDir
from tests.support.vllm_fill import Fill, empty_module, engine_config, tensors_after_load_weights

if TYPE_CHECKING:
    import torch

Convert = Callable[..., Checkpoint]

NOT_LOADED = {"bert": {"pooler.dense.weight", "pooler.dense.bias"}}
"""What vLLM's module has no place for."""


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert in this process, one rank; `change` may alter the module's tensors first."""

    def call(model: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda state: None) -> Checkpoint:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
        from sllm_vllm.checkpoint.source_records import SourceRecords
        from sllm_vllm.loader.module_state import named_state
        from sllm_vllm.loader.save import save_state
        from sllm_vllm.loader.vllm.layout import layout_of
        from sllm_vllm.loader.vllm.source import source_of

        config = engine_config(Fill(model))
        module = empty_module(config)
        with set_current_vllm_config(config):
            get_model_loader(config.load_config).load_weights(module, config.model_config)
            source = source_of(config.model_config, SourceRecords(tmp_path / "store"))
            key = CheckpointKey(source, layout_of(config, config.model_config))
        state = named_state(module)
        change(state)
        repository = CheckpointRepository(tmp_path / "store")
        save_state(repository.stage(key, MIB), 0, state)
        return repository.find(key)

    return call


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    import torch

    return {name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])}


def variant(model: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model directory with another config."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gpt2", "opt", "bert"])
def test_exported_safetensors_fill_the_same_module(
    model_dir: ModelDir, convert: Convert, tmp_path: Path, architecture: str
) -> None:
    source = model_dir(architecture)
    exported = export_checkpoint(convert(source), tmp_path / "out", "safetensors", shard_nbytes=2 * MIB)
    ours, stock = (tensors_after_load_weights(Fill(model)) for model in (exported.path, source))
    assert list(ours) == list(stock)
    assert differing(ours, stock) == set()
    weights, original = weights_of(exported.path), weights_of(source)
    assert original.keys() - weights.keys() == NOT_LOADED.get(architecture, set())
    assert weights.keys() <= original.keys()
    assert differing(weights, original) == set()
    assert exported.num_tensors == len(weights)
    assert exported.nbytes == sum(tensor.nbytes for tensor in weights.values())
    assert len(list(exported.path.glob("*.safetensors"))) > 1
    assert (exported.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_mixtral(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    """Qwen3-MoE's weights under Mixtral's names."""
    source = tmp_path / "mixtral"
    shutil.copytree(model_dir("qwen3_moe"), source)
    qwen = json.loads((source / "config.json").read_text())
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
    config = {key: qwen[key] for key in kept} | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "intermediate_size": qwen["moe_intermediate_size"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (source / "config.json").write_text(json.dumps(config))
    renamed = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_norm.weight" not in name:
            for old, new in renamed.items():
                name = name.replace(old, new)
            tensors[name] = tensor
        elif "layernorm" in name or name == "model.norm.weight":
            tensors[name] = tensor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    exported = export_checkpoint(convert(source), tmp_path / "out", "safetensors")
    weights = weights_of(exported.path)
    assert weights.keys() == tensors.keys()
    assert differing(weights, tensors) == set()


def test_padding_of_the_vocabulary_is_cut_off(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    source = variant(model_dir(), tmp_path / "odd", vocab_size=501)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:501].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = convert(source)
    stored = {tensor.name: tensor.shape[0] for tensor in checkpoint.manifest.partitions[0].tensors if tensor.shape}
    assert stored["lm_head.weight"] > 501
    exported = export_checkpoint(checkpoint, tmp_path / "out", "safetensors")
    assert differing(weights_of(exported.path), tensors) == set()
    assert weights_of(exported.path)["lm_head.weight"].shape[0] == 501
    assert not (exported.path / "model.safetensors.index.json").exists()
    assert len({path.stat().st_mode for path in exported.path.iterdir()}) == 1


def test_tensorizer_file_holds_the_same_tensors(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    source = model_dir("gpt2")
    exported = export_checkpoint(convert(source), tmp_path / "out", "tensorizer")
    tensors = dict(read_tensorizer(exported.path / "model.tensors"))
    original = weights_of(source)
    assert tensors.keys() == original.keys()
    assert differing(tensors, original) == set()
    assert not list(exported.path.glob("*.safetensors"))


def test_progress_counts_every_stored_byte(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    checkpoint, told = convert(model_dir()), list[int]()
    export_checkpoint(checkpoint, tmp_path / "out", "safetensors", on_progress=told.append)
    assert sum(told) == checkpoint.manifest.partitions[0].data_nbytes


def test_quantised_weights_have_no_way_back(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    with pytest.raises(NotExportable, match=r"it is quantised \(compressed-tensors\)"):
        export_checkpoint(convert(model_dir("llama_w8a8")), tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


def test_loaded_scales_are_not_dropped_in_silence(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.self_attn.attn._v_scale"].fill_(0.5)

    checkpoint = convert(model_dir(), change)
    with pytest.raises(NotExportable, match="_v_scale' was loaded from the source"):
        export_checkpoint(checkpoint, tmp_path / "out", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_the_source_must_still_be_what_it_was(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    source = variant(model_dir(), tmp_path / "source")
    checkpoint = convert(source)
    shutil.copy(model_dir("qwen2") / "model.safetensors", source / "model.safetensors")
    with pytest.raises(NotExportable, match="has changed"):
        export_checkpoint(checkpoint, tmp_path / "out", "safetensors")
    (source / "model.safetensors").unlink()
    assert export_checkpoint(checkpoint, tmp_path / "out", "safetensors").num_tensors == 39
    (source / "config.json").unlink()
    with pytest.raises(NotExportable, match=r"config\.json"):
        export_checkpoint(checkpoint, tmp_path / "again", "safetensors")


def test_out_is_never_overwritten(model_dir: ModelDir, convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary").touch()
    with pytest.raises(WriteError, match="it exists and is not empty"):
        export_checkpoint(convert(model_dir()), tmp_path / "out", "safetensors")
