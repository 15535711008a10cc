"""Loads without vLLM: fills a module of plain parameters with our loader or with safetensors. Needs torch, not vLLM.

The parameters are allocated beforehand, as an engine's are. On a GPU both ways fill them in place; on the CPU ours
rebinds them to the memory that it read into.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.common.cached_model import weight_files
from benchmarks.common.disturbance import Disturbance
from benchmarks.common.ready_machine import ready_machine
from benchmarks.loading.job import Job, Measurement
from benchmarks.loading.module_digest import digest_module
from benchmarks.loading.peak_memory import PeakMemory
from benchmarks.loading.plain_module import empty_module
from sllm_vllm.checkpoint.core.manifest import Layout, Source
from sllm_vllm.checkpoint.fingerprint import fingerprint_directory
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.loader.load import load_module
from sllm_vllm.loader.module_state import named_state
from sllm_vllm.loader.save import save_state


def measure(job: Job) -> Measurement:
    """Fill a module once and measure it."""
    module = empty_module(weight_files(job.model), torch.device(job.device))
    fill = _fill_of(job)
    residency = ready_machine(job)
    _synchronize(job)
    memory, others, start = PeakMemory(), Disturbance(), time.perf_counter()
    source = fill(module)
    _synchronize(job)
    seconds, disturbance = time.perf_counter() - start, others.share()
    return Measurement(
        seconds=seconds,
        weights_s=seconds,
        weights_wall_s=seconds,
        outcome="loaded" if source else "",
        source=source,
        residency=residency,
        peak_nbytes=memory.growth(),
        disturbance=disturbance,
    )


def digest(job: Job) -> str:
    """Digest of the module's tensors."""
    module = empty_module(weight_files(job.model), torch.device(job.device))
    _fill_of(job)(module)
    return digest_module(module)


def prepare(job: Job) -> None:
    """Write our checkpoint."""
    config = _config(job)
    module = empty_module(weight_files(job.model), torch.device("cpu"))
    _fill_by_safetensors(weight_files(job.model), "cpu")(module)
    save_state(
        CheckpointRepository(config.store_dir).stage(_key(job.model), config.chunk_bytes), 0, named_state(module)
    )


def worker_environment() -> dict[str, str]:
    """Empty: no vLLM worker is imitated."""
    return {}


def _fill_of(job: Job) -> Callable[[nn.Module], str]:
    if job.loader.load_format != "sllm":
        return _fill_by_safetensors(weight_files(job.model), job.device)
    config = _config(job)
    partition = CheckpointRepository(config.store_dir).find(_key(job.model)).partition(0)

    def fill(module: nn.Module) -> str:
        return load_module(partition, module, config).source or ""

    return fill


def _fill_by_safetensors(files: list[Path], device: str) -> Callable[[nn.Module], str]:
    def fill(module: nn.Module) -> str:
        for file in files:
            module.load_state_dict(load_file(file, device=device), strict=len(files) == 1)
        return ""

    return fill


def _config(job: Job) -> LoaderConfig:
    return LoaderConfig.from_extra_config(job.loader.extra_config)


def _key(model: Path) -> CheckpointKey:
    layout = Layout(model_class="plain", dtype="mixed", device_type="any", vllm_version="none", config_digest="")
    return CheckpointKey(Source(model=str(model), fingerprint=fingerprint_directory(model)), layout)


def _synchronize(job: Job) -> None:
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()
