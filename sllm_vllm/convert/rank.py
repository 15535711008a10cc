"""Converts one rank: vLLM builds its module on the host and fills it from the source weights, as at any start; then the
module's tensors are written. Needs no engine, KV cache or device. ``parent.py`` runs it in a separate process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import set_default_torch_dtype

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.fingerprint import READ_ASIDE, WEIGHT_SUFFIXES
from sllm_vllm.checkpoint.reader import open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository, Staging
from sllm_vllm.checkpoint.source_records import SourceRecords
from sllm_vllm.checkpoint.writer import write_partition
from sllm_vllm.config import LoaderConfig
from sllm_vllm.convert.model_files import CONFIG_NAME, adapt_config, copy_model_files, folders_read_aside, is_free
from sllm_vllm.convert.parent import BytesDone, ConvertRequest, Event, RankDone, RankJob, StageBegun
from sllm_vllm.convert.tensorizer_file import TENSORIZER_NAME, read_tensorizer
from sllm_vllm.errors import CheckpointError, CheckpointUnreadable, ConfigError, WriteError
from sllm_vllm.loader.module_state import TransientBuffers, dtype_name, named_state, storable_tensors
from sllm_vllm.loader.read import read_tensors
from sllm_vllm.loader.sink import byte_view
from sllm_vllm.loader.vllm.layout import layout_of
from sllm_vllm.loader.vllm.source import ModelSource, locate, require_weights_here
from sllm_vllm.units import MIB

_TOLD_NBYTES = 4 * MIB
_STOCK_SUFFIXES = (".safetensors", ".bin", ".pt")
_NO_COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

Tell = Callable[[Event], None]


def convert_rank(job: RankJob, tell: Tell) -> None:
    """Convert one rank, or compare it with a checkpoint. Every rank of the group has to call this.

    Raises:
        SllmError: the model can't be converted; the message says why.
    """
    source = _engine_config(job.request, job.request.model, job)
    _join_ranks(job, source)
    if job.request.compared is not None:
        tell(_compare_rank(job, job.request.compared, source, tell=tell))
        _leave_ranks()
        return
    target = source if job.model_files is None else _config_of_files(job, job.model_files, source)
    weights = ModelSource(locate(source.model_config), SourceRecords(job.root))
    key = CheckpointKey(_from_first_rank(weights.identify, job.rank), layout_of(target, target.model_config))
    dtype = _dtype_to_tell(job.request, source.model_config, target.model_config)
    found = _from_first_rank(lambda: _find(job, key), job.rank)
    if found is None:
        staging = CheckpointRepository(job.root).stage(key, job.request.chunk_nbytes)
        was_needed = _write_rank(job, staging, (source, target), weights=weights, tell=tell)
        staging.publish()
        torch.distributed.barrier()
        tell(RankDone(job.rank, staging.target, "written" if was_needed else "kept", dtype))
    else:
        tell(RankDone(job.rank, found, "found", dtype))
    _leave_ranks()


def _leave_ranks() -> None:
    torch.distributed.barrier()  # if a rank left early, the others' last collective would fail
    destroy_model_parallel()
    destroy_distributed_environment()


def _compare_rank(job: RankJob, compared: Path, source: VllmConfig, *, tell: Tell) -> RankDone:
    """Compare this rank's partition of a checkpoint with the module that the stock loader fills."""
    checkpoint = open_checkpoint(compared)
    is_model = (compared / CONFIG_NAME).exists()
    target = _engine_config(job.request, str(compared), job) if is_model else source
    state = _load_rank(job, source, target, tell=tell)
    partition = checkpoint.partition(job.rank)
    tell(StageBegun(job.rank, "compare", partition.record.nbytes))
    progress, differing, missing = _RankProgress(job.rank, tell), list[str](), set(state)
    for name, tensor in read_tensors(partition, LoaderConfig(store_dir=compared.parent, store=False, verify="always")):
        missing.discard(name)
        if name not in state or not _holds_the_same(state[name], tensor):
            differing.append(name)
        progress.add(tensor.nbytes)
    progress.flush()
    return RankDone(job.rank, compared, "compared", differing=(*differing, *sorted(missing)))


def _holds_the_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, and 0.0 does not equal -0.0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(byte_view(first.detach().contiguous()), byte_view(second.contiguous()))


def _engine_config(request: ConvertRequest, model: str, job: RankJob, *, dtype: str | None = None) -> VllmConfig:
    """The configuration that ``vllm serve`` would make from the same arguments, as far as it affects parameters."""
    arguments = EngineArgs(
        model=model,
        load_format="auto",
        dtype=dtype or request.dtype,
        quantization=request.quantization,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
        tensor_parallel_size=request.tensor_parallel_size,
        enforce_eager=True,
        use_tqdm_on_load=False,
    )
    config = arguments.create_engine_config()
    config.parallel_config.rank = job.rank
    return config


def _join_ranks(job: RankJob, config: VllmConfig) -> None:
    """Create the process groups from which vLLM gets rank and size. Only this module sends anything, over gloo."""
    world_size = job.request.tensor_parallel_size
    resolve_obj_by_qualname(config.parallel_config.worker_cls)  # imported for the platform's patches that come with it
    # Create the groups without a device communicator: loading weights needs none, and there may be no device.
    current_platform.get_device_communicator_cls = lambda: _NO_COMMUNICATOR
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job.run_dir / 'ranks'}", rank=job.rank, world_size=world_size
    )
    with set_current_vllm_config(config):
        init_distributed_environment(world_size, job.rank, local_rank=job.rank, backend="gloo")
        ensure_model_parallel_initialized(world_size, 1)


def _config_of_files(job: RankJob, model_files: Path, source: VllmConfig) -> VllmConfig:
    """Write the files of the model directory that is being made; returns the configuration it will be loaded with."""

    def write() -> None:
        config = source.model_config
        model = Path(config.model)
        if not model.is_dir():
            model = _download_model_files(config.model, config.revision)
        copy_model_files(model, model_files)
        is_untied = bool(getattr(config, "word_embeddings_untied_by_checkpoint", False))
        adapt_config(model_files, dtype=dtype_name(config.dtype), is_untied=is_untied)

    _from_first_rank(write, job.rank)
    target = _engine_config(job.request, str(model_files), job, dtype="auto")
    if target.model_config.dtype != source.model_config.dtype:
        target = _engine_config(job.request, str(model_files), job, dtype=dtype_name(source.model_config.dtype))
    return target


def _download_model_files(model: str, revision: str | None) -> Path:
    """Download a model without the weights that only the loader reads; returns its snapshot's directory."""
    ignored = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
    snapshot = Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))
    patterns = [f"{folder}/*" for folder in sorted(folders_read_aside(snapshot))]
    snapshot_download(model, revision=revision, allow_patterns=[*patterns, *READ_ASIDE])
    return snapshot


def _dtype_to_tell(request: ConvertRequest, source: ModelConfig, target: ModelConfig) -> str | None:
    """The ``--dtype`` that vLLM needs to load the converted model; None for ``auto``."""
    if source is target:
        return None if request.dtype == "auto" else request.dtype
    needed = dtype_name(target.dtype)
    return needed if str(getattr(target.hf_config, "dtype", None)).removeprefix("torch.") != needed else None


def _from_first_rank(function: Callable[[], Any], rank: int) -> Any:
    """Call ``function`` in rank 0 only, and return its result in every rank."""
    box = [function() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _find(job: RankJob, key: CheckpointKey) -> Path | None:
    """The checkpoint of ``key`` if it exists already. One that can't be used is set aside.

    Raises:
        WriteError: something else is in the checkpoint's place.
    """
    out = job.request.out
    if out is not None and not is_free(out):
        found = open_checkpoint(out).manifest
        if found.layout == key.layout and found.source.fingerprint == key.source.fingerprint:
            return out.absolute()
        problem = "it holds another model, or one for another configuration"
        raise WriteError(out, problem, "give a new or an empty directory")
    repository = CheckpointRepository(job.root)
    try:
        checkpoint = repository.find(key)
        for partition in checkpoint.manifest.partitions:
            checkpoint.partition(partition.rank).open().close()
    except CheckpointUnreadable:
        raise
    except CheckpointError:
        if (job.root / key.name / MANIFEST_NAME).exists():
            repository.set_aside(key.name)
        return None
    return checkpoint.path


def _write_rank(
    job: RankJob, staging: Staging, configs: tuple[VllmConfig, VllmConfig], *, weights: ModelSource, tell: Tell
) -> bool:
    """Load and write this rank's partition, unless an earlier conversion has. Returns whether it was written."""
    with staging.writer(job.rank) as needed:
        if needed:
            state = _load_rank(job, *configs, tell=tell)
            tensors = storable_tensors(state, job.request.model)
            tell(StageBegun(job.rank, "write", sum(tensor.spec.nbytes for tensor in tensors)))
            progress = _RankProgress(job.rank, tell)
            written = write_partition(
                staging.path, job.rank, tensors, chunk_nbytes=staging.chunk_nbytes, on_progress=progress.add
            )
            progress.flush()
            try:
                weights.require_unchanged(staging.key.source)
            except ConfigError:
                written.discard()
                raise
            staging.commit(written)
    return needed


def _load_rank(job: RankJob, source: VllmConfig, target: VllmConfig, *, tell: Tell) -> dict[str, torch.Tensor]:
    """Build and fill this rank's module; returns its tensors as they are before any post-processing."""
    with set_default_torch_dtype(target.model_config.dtype), torch.device("cpu"):
        module = initialize_model(vllm_config=target, model_config=target.model_config)
    transient = TransientBuffers(module)
    progress = _RankProgress(job.rank, tell)
    tell(StageBegun(job.rank, "read", _source_nbytes(Path(source.model_config.model))))
    with set_current_vllm_config(target):
        _SourceLoader(source.load_config, progress.add).load_weights(module, source.model_config)
    progress.flush()
    require_weights_here(module, source.model_config)
    return {**named_state(module), **transient.changed()}


class _SourceLoader(DefaultModelLoader):
    """vLLM's own loader, extended to read a tensorizer file and to count the bytes it reads."""

    def __init__(self, load_config: LoadConfig, on_read: Callable[[int], None]) -> None:
        super().__init__(load_config)
        self._on_read = on_read

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the source tensors with their Hugging Face names."""
        directory = Path(model_config.model)
        if _tells_tensorizer(directory):
            weights = read_tensorizer(directory / TENSORIZER_NAME)
        else:
            weights = super().get_all_weights(model_config, model)
        for name, tensor in weights:
            self._on_read(tensor.nbytes)
            yield name, tensor


def _tells_tensorizer(directory: Path) -> bool:
    """Whether a model directory has a tensorizer file and no weights that the stock loader could read."""
    if not (directory / TENSORIZER_NAME).is_file():
        return False
    return not any(path.name.endswith(_STOCK_SUFFIXES) for path in directory.iterdir())


def _source_nbytes(directory: Path) -> int | None:
    """Bytes of the files that will be read; None if unknown."""
    if not directory.is_dir():
        return None
    for suffix in (*_STOCK_SUFFIXES, ".tensors"):
        if found := [path.stat().st_size for path in directory.iterdir() if path.name.endswith(suffix)]:
            return sum(found)
    return None


class _RankProgress:
    """Sends progress events for every few MiB, not for every tensor."""

    def __init__(self, rank: int, tell: Tell) -> None:
        self._rank = rank
        self._tell = tell
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """Count bytes; send an event once there are enough of them."""
        self._nbytes += nbytes
        if self._nbytes >= _TOLD_NBYTES:
            self.flush()

    def flush(self) -> None:
        """Send an event for the bytes that were not reported yet."""
        if self._nbytes:
            self._tell(BytesDone(self._rank, self._nbytes))
        self._nbytes = 0
