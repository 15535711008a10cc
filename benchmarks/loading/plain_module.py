"""A module of plain parameters, for measuring loaders with torch, but without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

HIDDEN = 2048
INTERMEDIATE = 5504
VOCAB = 8192
NUM_LAYERS = 22
"""The dimensions of a Llama of 2 GB; its parameters are fused as in vLLM."""


def llama_shapes(num_layers: int = NUM_LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, in execution order."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(num_layers):
        stem = f"model.layers.{layer}"
        shapes[f"{stem}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{stem}.self_attn.qkv_proj.weight"] = (HIDDEN + HIDDEN // 2, HIDDEN)
        shapes[f"{stem}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{stem}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{stem}.mlp.gate_up_proj.weight"] = (2 * INTERMEDIATE, HIDDEN)
        shapes[f"{stem}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_plain_model(directory: Path, *, num_layers: int = NUM_LAYERS, seed: int = 0) -> Path:
    """Write ``model.safetensors`` with seeded random bits; returns the directory."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in llama_shapes(num_layers).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def empty_module(files: list[Path], device: torch.device) -> nn.Module:
    """A module with an allocated, uninitialised parameter for each tensor of the safetensors files."""
    root = nn.Module()
    for file in files:
        for name, entry in _header(file).items():
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device=device)
            owner = root
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(header)
