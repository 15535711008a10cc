"""vLLM's post-processing, begun for each module as soon as its weights are there.

On the CPU most of ``load_model`` is packing: each linear layer's weight is copied into the kernel's own layout. Stock
vLLM begins when the last byte was read. Here a module is packed while the next one's chunks arrive. Only for methods
that are known to look at nothing but their own layer; the others, and everything behind the per-layer step, wait for
the whole model and go through vLLM's own function.
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
"""Their ``process_weights_after_loading(layer)`` reads and writes ``layer`` alone (read in vLLM 0.32)."""


def process_while_loading(
    load: RunningLoad, model: nn.Module, model_config: ModelConfig, *, device: torch.device
) -> float:
    """Post-process ``model``, to which ``load`` is bound, while it is being filled.

    Returns:
        Seconds of post-processing, waiting not counted.

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
    """Modules to process early, and the records each needs, in the order in which they become complete."""
    modules = [m for m in model.modules() if type(getattr(m, "quant_method", None)) in LAYER_LOCAL_METHODS]
    steps = [(module, load.records_of(module)) for module in modules]
    return sorted(steps, key=lambda step: load.ready_position(step[1]))


@contextlib.contextmanager
def _done_already(modules: list[Any]) -> Iterator[None]:
    """Keep vLLM's own loop from processing these modules twice; their methods stay in place and of their class."""
    methods = {id(module.quant_method): module.quant_method for module in modules}
    for method in methods.values():
        method.process_weights_after_loading = lambda layer: None
    try:
        yield
    finally:
        for method in methods.values():
            del method.process_weights_after_loading
