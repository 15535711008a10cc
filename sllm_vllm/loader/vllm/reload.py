"""Lets vLLM's ``reload_weights`` load from our format.

vLLM passes an iterator of Hugging Face tensors to the model's ``load_weights``. Our tensors are fused and sharded
already, so the model must not fuse and slice them again. For one call, the model's ``load_weights`` is therefore
replaced by one that fills the layers directly, through vLLM's own layer-wise reloading: once a layer's last tensor has
arrived, the layer is materialised, loaded, post-processed and copied into place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload.layerwise import make_online_process_loader
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

_CONFIGS: WeakKeyDictionary[nn.Module, VllmConfig] = WeakKeyDictionary()
"""The configuration of each live model, needed because vLLM 0.26 reloads through a new loader, and sets none there."""


def remember_config(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Remember a loaded model's configuration until the model is garbage-collected."""
    _CONFIGS[model] = vllm_config


def config_of(model: nn.Module) -> VllmConfig:
    """The configuration of a model that is being reloaded: vLLM's current one where it sets one (0.27 and newer)."""
    return get_current_vllm_config_or_none() or _CONFIGS[model]


def reload_layers_once(model: nn.Module) -> None:
    """Make the next ``model.load_weights(tensors)``, and only that one, take tensors by their names in the module."""

    def load_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        del model.load_weights
        return _reload_layers(model, tensors)

    model.load_weights = load_weights  # type: ignore[assignment]


def _reload_layers(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load ``tensors``, by their names in the module, into a model that vLLM is reloading layer by layer.

    Returns:
        Names of the loaded tensors.
    """
    original: list[tuple[Any, object]] = []
    owners = {name: (layer, short) for name, layer, short in _owners(model)}
    loaded = set()
    try:
        for name, tensor in tensors:
            layer, short = owners[name]
            live: Any = getattr(layer, short)
            original.append((live, getattr(live, "weight_loader", None)))
            live.weight_loader = default_weight_loader
            live.weight_loader = make_online_process_loader(layer, short)
            live.weight_loader(live, tensor)
            loaded.add(name)
    finally:
        for live, weight_loader in original:
            if weight_loader is not None:
                live.weight_loader = weight_loader
    return loaded


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, layer in model.named_modules(remove_duplicate=False):
        for short in get_layer_tensors(layer):
            yield (f"{prefix}.{short}" if prefix else short), layer, short
