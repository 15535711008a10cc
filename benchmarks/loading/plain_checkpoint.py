"""Checkpoints of a plain module, written without a model: for measuring the store with torch, but without vLLM."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.loading.plain_module import llama_shapes
from sllm_vllm.checkpoint.core.manifest import Layout, Source
from sllm_vllm.checkpoint.reader import Checkpoint, RankPartition, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
from sllm_vllm.loader.save import save_state

NUM_LAYERS = 13
"""Gives 1.22 GB in bfloat16."""


def write_plain_checkpoint(
    store_dir: Path, name: str, *, num_layers: int = NUM_LAYERS, chunk_nbytes: int = CHUNK_NBYTES_DEFAULT
) -> Checkpoint:
    """Publish a checkpoint of seeded random bits, unless it exists. ``name`` is its model's name and gives the seed."""
    layout = Layout(model_class="plain", dtype="bfloat16", device_type="any", vllm_version="none", config_digest="")
    key = CheckpointKey(Source(model=name, fingerprint=name), layout)
    staging = CheckpointRepository(store_dir).stage(key, chunk_nbytes)
    if not staging.target.exists():
        save_state(staging, 0, _random_state(num_layers, seed=sum(name.encode())))
    return open_checkpoint(staging.target)


def module_for(partition: RankPartition, device: torch.device) -> nn.Module:
    """A module with an allocated, uninitialised parameter for each of the partition's tensors."""
    root = nn.Module()
    for record in partition.record.tensors:
        *path, leaf = record.name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        tensor = torch.empty(record.shape, dtype=getattr(torch, record.dtype), device=device)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def _random_state(num_layers: int, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in llama_shapes(num_layers).items()
    }
