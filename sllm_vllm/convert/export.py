"""Exports a checkpoint as a Hugging Face model directory, with its weights as safetensors or in a tensorizer file.

Needs torch. Tensors are read, cut and written one by one; at most one safetensors file is held in memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import save_file

from sllm_vllm.checkpoint.fingerprint import fingerprint_directory, has_weight_files
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.writer import write_errors, write_file_durably
from sllm_vllm.config import LoaderConfig
from sllm_vllm.convert.hugging_face import NoWayBack, Piece, TensorPlan, holds_output_layer, plan_export
from sllm_vllm.convert.model_files import (
    CONFIG_NAME,
    adapt_config,
    copy_model_files,
    put_in_place,
    read_config,
    require_free,
    sync_file,
    workplace,
)
from sllm_vllm.errors import ConfigError, NotExportable, WriteError
from sllm_vllm.loader.read import read_tensors
from sllm_vllm.units import GIB

SHARD_NBYTES = 4 * GIB
"""Most bytes of tensors in one safetensors file, unless a single tensor is larger."""

ExportFormat = Literal["safetensors", "tensorizer"]


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished model directory."""

    path: Path
    num_tensors: int
    nbytes: int


class _Writer(Protocol):
    def write(self, name: str, tensor: torch.Tensor) -> None: ...

    def close(self) -> None: ...


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    form: ExportFormat,
    *,
    shard_nbytes: int = SHARD_NBYTES,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> Exported:
    """Write a model directory that any tool for Hugging Face models can read.

    Tensors of the source that vLLM did not load, e.g. an unused pooler, are not in it.

    Args:
        on_progress: called with the number of bytes of each stored tensor once its pieces were handed to the writer.

    Raises:
        NotExportable: the layout can't be exported.
        CheckpointError: the checkpoint can't be read.
        WriteError: ``out`` can't be written.
    """
    out = out.expanduser().absolute()
    files = _model_files_of(checkpoint)
    try:
        plans = plan_export(checkpoint.manifest.layout, checkpoint.manifest.partitions[0].tensors, read_config(files))
    except (NoWayBack, ConfigError) as error:
        raise NotExportable(checkpoint.path, str(error), "use the source model instead") from None
    require_free(out)
    with workplace(out, "exporting") as root:
        directory = root / "model"
        with write_errors(directory):
            directory.mkdir()
        copy_model_files(files, directory)
        dtype, is_untied = checkpoint.manifest.layout.dtype, holds_output_layer(plans)
        adapt_config(directory, dtype=dtype, is_untied=is_untied)
        writer = _open_writer(directory, form, plans, shard_nbytes=shard_nbytes)
        _write_tensors(checkpoint, plans, writer, on_progress=on_progress)
        put_in_place(directory, out)
    nbytes = sum(_nbytes(plan, piece) for plan in plans for piece in plan.pieces)
    return Exported(out, sum(len(plan.pieces) for plan in plans), nbytes)


def _write_tensors(
    checkpoint: Checkpoint, plans: Sequence[TensorPlan], writer: _Writer, *, on_progress: Callable[[int], None]
) -> None:
    by_name = {plan.record.name: plan for plan in plans}
    for name, tensor in read_tensors(checkpoint.partition(0), LoaderConfig(verify="always")):
        plan = by_name.get(name)
        if plan is None:  # an alias of a tied tensor, already written
            continue
        if plan.default is not None and not bool((tensor == plan.default).all()):
            problem = f"tensor {name!r} was loaded from the source, and Hugging Face has no name for it"
            raise NotExportable(checkpoint.path, problem, "use the source model instead")
        for piece in plan.pieces:
            writer.write(piece.name, _cut(tensor, piece))
        on_progress(plan.record.nbytes)
    writer.close()


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece as a contiguous tensor, sharing memory with ``tensor`` where possible."""
    rows = (tensor if piece.index is None else tensor[piece.index])[piece.start : piece.stop]
    return (rows.t() if piece.transposed else rows).contiguous()


def _open_writer(directory: Path, form: ExportFormat, plans: Sequence[TensorPlan], *, shard_nbytes: int) -> _Writer:
    if form == "safetensors":
        return _SafetensorsWriter(directory, _plan_shards(plans, shard_nbytes))
    from sllm_vllm.convert.tensorizer_file import TENSORIZER_NAME, TensorizerWriter

    return TensorizerWriter(directory / TENSORIZER_NAME)


def _plan_shards(plans: Sequence[TensorPlan], shard_nbytes: int) -> list[dict[str, int]]:
    """For each shard, the bytes of its tensors by name, in the order in which they will be written."""
    shards: list[dict[str, int]] = [{}]
    for plan in plans:
        for piece in plan.pieces:
            nbytes = _nbytes(plan, piece)
            if shards[-1] and sum(shards[-1].values()) + nbytes > shard_nbytes:
                shards.append({})
            shards[-1][piece.name] = nbytes
    return shards


def _nbytes(plan: TensorPlan, piece: Piece) -> int:
    return math.prod(piece.shape) * plan.record.item_nbytes


class _SafetensorsWriter:
    """Writes each shard once all its tensors have arrived, and an index if there is more than one shard."""

    def __init__(self, directory: Path, shards: list[dict[str, int]]) -> None:
        self._directory = directory
        self._shards = shards
        self._num_written = 0
        self._tensors: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor in the planned order."""
        self._tensors[name] = tensor
        if self._tensors.keys() == self._shards[self._num_written].keys():
            self._write_shard()

    def close(self) -> None:
        """Write the index, if needed.

        Raises:
            WriteError: the index can't be written.
        """
        assert self._num_written == len(self._shards), "tensors are missing"
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in self._shards)},
            "weight_map": {name: self._file_name(i) for i, shard in enumerate(self._shards) for name in shard},
        }
        content = json.dumps(index, indent=2).encode() + b"\n"
        write_file_durably(self._directory / "model.safetensors.index.json", content)

    def _write_shard(self) -> None:
        path = self._directory / self._file_name(self._num_written)
        try:
            with write_errors(path):
                save_file(self._tensors, path, metadata={"format": "pt"})
                shutil.copymode(self._directory / CONFIG_NAME, path)  # safetensors makes it readable by the owner only
                sync_file(path)
        except SafetensorError as error:
            raise WriteError(path, f"it can't be written ({error})", "free some space or give another --out") from None
        self._tensors = {}
        self._num_written += 1

    def _file_name(self, shard: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def _model_files_of(checkpoint: Checkpoint) -> Path:
    """The directory with the configuration and tokenizer of a checkpoint's model.

    Raises:
        NotExportable: the directory is gone, or has other weights now.
    """
    if (checkpoint.path / CONFIG_NAME).exists():
        return checkpoint.path
    source = checkpoint.manifest.source
    directory = Path(source.model)
    if not directory.is_dir():
        cached = try_to_load_from_cache(source.model, CONFIG_NAME, revision=source.revision)
        directory = Path(cached).parent if isinstance(cached, str) else directory
    elif has_weight_files(directory) and fingerprint_directory(directory) != source.fingerprint:
        problem = f"its source {directory} has changed since"
        raise NotExportable(checkpoint.path, problem, "convert it again, or use the source model instead")
    if not (directory / CONFIG_NAME).exists():
        problem = f"the config.json of its source {source.model} is not on this machine"
        raise NotExportable(checkpoint.path, problem, "bring the source's config.json and tokenizer back")
    return directory
