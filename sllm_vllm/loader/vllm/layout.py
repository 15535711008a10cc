"""Derives a checkpoint's layout, part of its key, from vLLM's configuration, and this worker's partition."""

from __future__ import annotations

import json
from dataclasses import dataclass

import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.parallel_state import get_dp_group, get_pp_group, get_tp_group
from vllm.platforms import current_platform

from sllm_vllm.checkpoint.checksum import digest
from sllm_vllm.checkpoint.core.manifest import Layout

_NOT_LAYOUT = ("_name_or_path", "transformers_version", "_commit_hash")
"""Keys of a Hugging Face configuration that say where it comes from and not what the model is."""


@dataclass(frozen=True, slots=True)
class RankPosition:
    """The number of this worker's partition, and how many there are."""

    rank: int
    num_partitions: int


def rank_position(vllm_config: VllmConfig) -> RankPosition:
    """This worker's position. Data-parallel ranks share a partition, unless experts are distributed over them."""
    tensor, pipeline = get_tp_group(), get_pp_group()
    rank = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
    count = pipeline.world_size * tensor.world_size
    if vllm_config.parallel_config.enable_expert_parallel:
        data = get_dp_group()
        return RankPosition(data.rank_in_group * count + rank, count * data.world_size)
    return RankPosition(rank, count)


def layout_of(vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Layout:
    """The layout: everything that affects what the module's parameters hold, except the source weights."""
    # Imported here, because importing vLLM's loaders registers ours, which imports this module.
    from vllm.model_executor.model_loader.utils import get_model_architecture

    parallel = vllm_config.parallel_config
    model_class = get_model_architecture(model_config)[0]
    count = rank_position(vllm_config).num_partitions
    return Layout(
        model_class=f"{model_class.__module__}.{model_class.__qualname__}",
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization) if model_config.quantization else None,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel_size=count if parallel.enable_expert_parallel else 1,
        num_partitions=count,
        device_type=current_platform.device_type,
        vllm_version=vllm.__version__,
        config_digest=_config_digest(vllm_config, model_config, prefix),
    )


def _config_digest(vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> str:
    """Digest of what has no field of its own: the model's configuration and vLLM's options that shape the module."""
    parallel, config = vllm_config.parallel_config, model_config.hf_config.to_dict()
    facts = {
        "config": {key: value for key, value in config.items() if key not in _NOT_LAYOUT},
        "prefix": prefix,
        "quantization": str(getattr(model_config, "quantization_config", None)),
        "ignored": vllm_config.load_config.ignore_patterns,
        "multimodal": str(getattr(model_config, "multimodal_config", None)),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "lora": vllm_config.lora_config is not None,
        "expert_parallel": [
            parallel.enable_expert_parallel,
            parallel.enable_eplb,
            str(getattr(parallel, "expert_placement_strategy", None)),
            str(getattr(parallel, "eplb_config", None)),
        ],
    }
    return digest(json.dumps(facts, sort_keys=True, default=str).encode())
