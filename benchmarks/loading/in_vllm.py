"""Loads inside vLLM, as a worker does: times the loader's whole ``load_model`` and its parts. Imports vLLM."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import base_loader, get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import get_model_architecture

from benchmarks.common.disturbance import Disturbance
from benchmarks.common.ready_machine import ready_machine
from benchmarks.loading.job import Job, Measurement
from benchmarks.loading.module_digest import digest_module
from benchmarks.loading.peak_memory import PeakMemory
from sllm_vllm.config import child_environment
from tests.support.vllm_fill import Fill, engine_config, join_model_parallel, load_model, module_after_load_weights

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Parts:
    """Seconds of the parts of a stock ``load_model``."""

    construct_s: float = 0.0
    weights_s: float = 0.0
    process_s: float = 0.0


def measure(job: Job) -> Measurement:
    """Load once and measure it."""
    config = engine_config(_fill(job))
    join_model_parallel(config)
    get_model_architecture(config.model_config)  # imports the model's class, which a worker does well before
    loader = get_model_loader(config.load_config)
    residency = ready_machine(job)
    with set_current_vllm_config(config), _timed(loader) as parts:
        memory, others, start = PeakMemory(), Disturbance(), time.perf_counter()
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
        _synchronize()
        seconds, disturbance = time.perf_counter() - start, others.share()
    del model  # only now: freeing the model is not part of the load
    found = Measurement(
        seconds=seconds,
        construct_s=parts.construct_s,
        weights_s=parts.weights_s,
        weights_wall_s=parts.weights_s,
        process_s=parts.process_s,
        residency=residency,
        peak_nbytes=memory.growth(),
        disturbance=disturbance,
    )
    if job.loader.load_format == "sllm":
        report = loader.report
        found.outcome, found.weights_wall_s = report.outcome, report.weights_s
        found.source = report.source or ""
        found.construct_s, found.weights_s, found.process_s = report.construct_s, report.wait_s, report.process_s
    return found


def digest(job: Job) -> str:
    """Digest of the module's tensors before post-processing, which destroys them on the CPU."""
    return digest_module(module_after_load_weights(_fill(job)))


def prepare(job: Job) -> None:
    """Write the files that a loader reads, if it does not read the Hugging Face checkpoint."""
    assert job.target is not None
    module = load_model(Fill(job.model))
    job.target.mkdir()
    for file in job.model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, job.target)
    if job.loader.load_format == "sharded_state":
        from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

        ShardedStateLoader.save_model(module, str(job.target))
    else:
        _tensorize(module, job.loader.extra_config["tensorizer_config"]["tensorizer_uri"])


def worker_environment() -> dict[str, str]:
    """The environment that vLLM sets for its CPU worker: it pins OpenMP's threads, and with them the main thread."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    before = child_environment()
    manager = OMPProcessManager(SimpleNamespace(parallel_config=parallel, kv_transfer_config=None))
    with manager.configure_omp_envs(rank=0, local_rank=0):
        return {name: value for name, value in child_environment().items() if before.get(name) != value}


def _fill(job: Job) -> Fill:
    loader = job.loader
    return Fill(job.model, loader.load_format, dict(loader.extra_config), engine_args=dict(loader.engine_args))


@contextlib.contextmanager
def _timed(loader: BaseModelLoader) -> Iterator[Parts]:
    """Time the three steps of ``BaseModelLoader.load_model``. Our loader has its own steps and reports their times."""
    parts = Parts()

    def timed(part: str, function: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _synchronize()
                setattr(parts, part, getattr(parts, part) + time.perf_counter() - start)

        return call

    stock_process = base_loader.process_weights_after_loading
    if hasattr(loader, "create_model"):  # from vLLM 0.30 on
        loader.create_model = timed("construct_s", loader.create_model)
    loader.load_weights = timed("weights_s", loader.load_weights)
    base_loader.process_weights_after_loading = timed("process_s", stock_process)
    try:
        yield parts
    finally:
        base_loader.process_weights_after_loading = stock_process


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensorize(module: nn.Module, path: str) -> None:
    """Serialise as vLLM's ``serialize_vllm_model`` does, but without fetching files from a hub."""
    from tensorizer import TensorSerializer

    marker = nn.Parameter(torch.tensor((1,), device="meta"), requires_grad=False)
    module.register_parameter("vllm_tensorized_marker", marker)
    serializer = TensorSerializer(path)
    serializer.write_module(module)
    serializer.close()
