"""Runs vLLM's post-processing for each module as soon as its weights have arrived.

On the CPU, ``load_model`` spends most of its time packing: each linear layer's weight is copied into the kernel's own
layout. Stock vLLM begins after the last byte was read. Here a module is packed while the next one's chunks arrive. This
is done only for quantisation methods that are known to use nothing but their own layer. All others, and all steps after
the per-layer one, wait for the whole model and go through vLLM's own function.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from sllm_vllm.loader.load import RunningLoad

LAYER_LOCAL_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Methods whose ``process_weights_after_loading(layer)`` reads and writes only ``layer`` (checked in vLLM 0.32's code).
"""


def process_while_loading(
    load: RunningLoad, model: nn.Module, model_config: ModelConfig, *, device: torch.device
) -> float:
    """Post-process ``model``, to which ``load`` is bound, while it is being filled.

    Returns:
        Seconds of post-processing, without waiting for bytes.

    Raises:
        CheckpointError: the partition can't be read, or differs from its checksums.
    """
    spent_s, processed = 0.0, list[Any]()
    if device.type == "cpu" and not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        for module, records in _steps(load, model):
            load.require(records)
            start = time.perf_counter()
            module.quant_method.process_weights_after_loading(module)
            if hasattr(module, "update_param_tp_status"):
                module.update_param_tp_status()
            spent_s += time.perf_counter() - start
            processed.append(module)
    load.finish()
    start = time.perf_counter()
    with _done_already(processed):
        process_weights_after_loading(model, model_config, device)
    return spent_s + time.perf_counter() - start


def _steps(load: RunningLoad, model: nn.Module) -> list[tuple[Any, set[int]]]:
    """Modules to process early, with the records that each needs, in the order in which they become complete."""
    modules = [m for m in model.modules() if type(getattr(m, "quant_method", None)) in LAYER_LOCAL_METHODS]
    steps = [(module, load.records_of(module)) for module in modules]
    return sorted(steps, key=lambda step: load.ready_position(step[1]))


@contextlib.contextmanager
def _done_already(modules: list[Any]) -> Iterator[None]:
    """Keep vLLM's own loop from processing these modules a second time.

    It still finds their methods, with their own class, but calling them does nothing.
    """
    methods = {id(module.quant_method): module.quant_method for module in modules}
    for method in methods.values():
        method.process_weights_after_loading = lambda layer: None
    try:
        yield
    finally:
        for method in methods.values():
            del method.process_weights_after_loading
