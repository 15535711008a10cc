"""The loaders that are compared: ours, and every format of stock vLLM that a machine may have."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks.loading.job import OURS, OURS_RESIDENT, REFERENCE, Loader

PLAIN_REFERENCE = "safetensors load_file"


def vllm_loaders(scratch: Path) -> list[Loader]:
    """Every loader, ours first. Loaders that need a checkpoint of their own write it to ``scratch``."""
    tensors = scratch / "tensorizer" / "model.tensors"
    return [
        Loader(name=OURS, load_format="sllm", extra_config={"store_dir": str(scratch / "store"), "store": False}),
        resident_loader(scratch),
        Loader(name=REFERENCE, load_format="auto", engine_args={"safetensors_load_strategy": "lazy"}),
        Loader(name="auto eager", load_format="auto", engine_args={"safetensors_load_strategy": "eager"}),
        Loader(name="auto prefetch", load_format="auto", engine_args={"safetensors_load_strategy": "prefetch"}),
        Loader(name="auto multithread", load_format="auto", extra_config={"enable_multithread_load": True}),
        Loader(name="runai_streamer", load_format="runai_streamer", needs_module="runai_model_streamer"),
        Loader(name="fastsafetensors", load_format="fastsafetensors", needs_cuda=True, needs_module="fastsafetensors"),
        Loader(name="instanttensor", load_format="instanttensor", needs_cuda=True, needs_module="instanttensor"),
        Loader(name="sharded_state", load_format="sharded_state", needs_cuda=True, is_prepared=True),
        Loader(
            name="tensorizer",
            load_format="tensorizer",
            extra_config={"tensorizer_config": {"tensorizer_uri": str(tensors)}},
            needs_cuda=True,
            needs_module="tensorizer",
            is_prepared=True,
        ),
    ]


def plain_loaders(scratch: Path) -> list[Loader]:
    """The loaders that work without vLLM."""
    return [
        Loader(
            name=OURS,
            load_format="sllm",
            extra_config={"store_dir": str(scratch / "store"), "store": False},
            is_prepared=True,
        ),
        resident_loader(scratch),
        Loader(name=PLAIN_REFERENCE, load_format="safetensors", needs_module="safetensors"),
    ]


def resident_loader(scratch: Path) -> Loader:
    """Our loader, reading from the daemon's memory."""
    extra_config = {"store_dir": str(scratch / "store")}
    return Loader(name=OURS_RESIDENT, load_format="sllm", extra_config=extra_config, needs_store=True)


def missing(loader: Loader, *, has_cuda: bool) -> str:
    """Why a loader can't run on this machine, as far as known without trying; empty if it may run."""
    if loader.needs_cuda and not has_cuda:
        return "needs CUDA"
    if loader.needs_module is not None and importlib.util.find_spec(loader.needs_module) is None:
        return f"{loader.needs_module} is not installed"
    return ""
