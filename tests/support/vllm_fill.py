"""Fills vLLM modules with weights, without an engine, so that tests can compare load formats bit for bit.

Owns: the engine config of a fill, the distributed environment of the test process (one rank) or of spawned ranks, and
the walk from an empty module to its tensors. Not pure: vLLM keeps the distributed environment in module globals, and
whoever calls this must have called `prepare_environment` before anything imported vLLM (`conftest.py` does).
vLLM is imported inside functions, so that collecting tests stays fast.

One rank, in this process; each fill has its own engine config, so any number of fills can follow one another:

    tensors = tensors_after_load_weights(Fill(model_dir, load_format="sllm"))

Two tensor-parallel ranks, in spawned processes; the results come back in rank order:

    first, second = run_ranks(tensors_after_load_weights, 2, Fill(model_dir))
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

P = ParamSpec("P")
R = TypeVar("R")

RANKS_TIMEOUT_S = 180.0
MODEL_LEN_MAX = 256
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The default binds every process to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Fill:
    """What to load, and how; picklable, so that it can be handed to spawned ranks."""

    model_dir: Path
    load_format: str = "auto"
    extra_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    engine_args: dict[str, Any] = field(default_factory=dict)


class RankFailed(Exception):
    """A spawned rank raised, died or outlived its time; the message has its traceback where there is one."""


def prepare_environment() -> None:
    """Set what vLLM reads when it is imported, where the caller has not set it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tensors_after_load_weights(fill: Fill) -> dict[str, "torch.Tensor"]:
    """Clones of the module's tensors between `load_weights` and `process_weights_after_loading`, in module order."""
    return cloned_tensors(module_after_load_weights(fill))


def module_after_load_weights(fill: Fill) -> "torch.nn.Module":
    """The module filled by the loader's `load_weights`, its weights not yet packed for a kernel."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = engine_config(fill)
    module = empty_module(config)
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(module, config.model_config)
    return module


def load_model(fill: Fill) -> "torch.nn.Module":
    """The module after the loader's whole `load_model`.

    On the CPU this packs most linear weights into opaque handles and leaves empty parameters behind.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = engine_config(fill)
    join_model_parallel(config)
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        module: torch.nn.Module = loader.load_model(vllm_config=config, model_config=config.model_config)
    return module


def look_at_models_here() -> None:
    """vLLM asks a process of its own what a model's class is like, for CUDA's sake: twenty seconds for each."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def engine_config(fill: Fill) -> "VllmConfig":
    """A new engine config with as many tensor-parallel ranks as this process's group has; loads the plugins."""
    from vllm.engine.arg_utils import EngineArgs

    look_at_models_here()

    rank, world_size = _rank_and_world_size()
    arguments: dict[str, Any] = {
        "model": str(fill.model_dir),
        "load_format": fill.load_format,
        "model_loader_extra_config": dict(fill.extra_config),
        "dtype": fill.dtype,
        "enforce_eager": True,
        "max_model_len": MODEL_LEN_MAX,
        "use_tqdm_on_load": False,
        "tensor_parallel_size": world_size,
    }
    config = EngineArgs(**(arguments | fill.engine_args)).create_engine_config()
    config.parallel_config.rank = rank
    return config


def empty_module(config: "VllmConfig") -> "torch.nn.Module":
    """The module with uninitialised weights, on the CPU; a config makes one module only."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    join_model_parallel(config)
    with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        module: torch.nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
    return module


def cloned_tensors(module: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Parameters, tied ones under each of their names, then persistent buffers."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    persistent = {name: buffers[name] for name in module.state_dict() if name in buffers}
    return {name: tensor.detach().clone() for name, tensor in (parameters | persistent).items()}


def join_model_parallel(config: "VllmConfig") -> None:
    """Set up vLLM's process groups once a process; later calls only check that the sizes still agree."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
        parallel_state,
    )
    from vllm.utils.import_utils import resolve_obj_by_qualname

    # Importing the worker of this platform applies its patches: without a GPU, of `torch.accelerator`.
    resolve_obj_by_qualname(config.parallel_config.worker_cls)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if config.model_config.is_moe and parallel_state._EP is None:
        # Groups made for a dense model lack the one for experts; the other way round does no harm.
        destroy_model_parallel()
    rank, world_size = _rank_and_world_size()
    with set_current_vllm_config(config):
        init_distributed_environment(world_size, rank, local_rank=rank, backend="gloo")
        parallel = config.parallel_config
        ensure_model_parallel_initialized(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def run_ranks(function: Callable[P, R], world_size: int, *args: P.args, **kwargs: P.kwargs) -> list[R]:
    """Run `function`, importable by name, in `world_size` spawned ranks of one gloo group; results in rank order.

    Raises `RankFailed` as soon as one rank fails, or after `RANKS_TIMEOUT_S`; no child outlives the call.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as run_dir:
        children: list[multiprocessing.process.BaseProcess] = [
            context.Process(
                target=_run_rank, args=(rank, world_size, Path(run_dir), function, args, kwargs), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for child in children:
                child.start()
            _wait(children, Path(run_dir))
            # Written by our own children a moment ago, and not only tensors.
            return [torch.load(_result_path(Path(run_dir), rank), weights_only=False) for rank in range(world_size)]
        finally:
            for child in children:
                if child.pid is not None:
                    child.kill()
                    child.join()


def _run_rank(
    rank: int,
    world_size: int,
    run_dir: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Body of a spawned rank: join the group, call, leave the result or the traceback in `run_dir`."""
    import torch

    try:
        prepare_environment()
        # Ranks of one group must agree on this name, of vLLM's shared memory between ranks.
        os.environ["VLLM_DIST_IDENT"] = run_dir.name
        # Sockets between ranks, which vLLM leaves behind.
        os.environ["VLLM_RPC_BASE_PATH"] = str(run_dir)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{run_dir / 'store'}", rank=rank, world_size=world_size
        )
        torch.save(function(*args, **kwargs), _result_path(run_dir, rank))
    except BaseException:
        _traceback_path(run_dir, rank).write_text(traceback.format_exc())
        raise SystemExit(1) from None
    # A rank that leaves early would fail the others' last collective.
    torch.distributed.barrier()
    if "vllm" in sys.modules:
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        # Frees the shared memory between ranks.
        destroy_model_parallel()
        destroy_distributed_environment()


def _wait(children: list[multiprocessing.process.BaseProcess], run_dir: Path) -> None:
    """Return when every child has ended well; raise `RankFailed` for the first that has not."""
    deadline_s = time.monotonic() + RANKS_TIMEOUT_S
    running = dict(enumerate(children))
    while running:
        timeout_s = deadline_s - time.monotonic()
        if timeout_s <= 0:
            raise RankFailed(f"ranks {sorted(running)} still run after {RANKS_TIMEOUT_S:.0f} s")
        multiprocessing.connection.wait([child.sentinel for child in running.values()], timeout_s)
        ended = {rank: child for rank, child in running.items() if not child.is_alive()}
        for rank, child in ended.items():
            del running[rank]
            if child.exitcode != 0:
                path = _traceback_path(run_dir, rank)
                detail = path.read_text() if path.exists() else "no traceback: killed, or failed while importing"
                raise RankFailed(f"rank {rank} ended with code {child.exitcode}\n{detail}")


def _rank_and_world_size() -> tuple[int, int]:
    import torch

    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _result_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"result-{rank}.pt"


def _traceback_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"traceback-{rank}.txt"
