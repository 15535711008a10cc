"""Finds the checkpoint for what vLLM is about to load, and says what to do when there is none or a bad one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, Layout
from sllm_vllm.checkpoint.fingerprint import has_weight_files
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.config import LoaderConfig, default_store_socket
from sllm_vllm.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointInvalid,
    CheckpointMissing,
    ConfigError,
    LayoutMismatch,
    RemoteError,
    SllmError,
    StoreError,
    StoreUnavailable,
    WriteError,
)
from sllm_vllm.loader.vllm_layout import layout_of, source_of
from sllm_vllm.store.client import StoreClient

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class Found:
    """What the catalog knows of one model: a checkpoint to load, or the key under which to write one, or neither."""

    checkpoint: Checkpoint | None = None
    key: CheckpointKey | None = None
    is_model_itself: bool = False
    """The checkpoint is all there is of the model: without it, it can't be loaded."""


class Catalog:
    """The checkpoints that a loader may use: in the model's own directory, the repository, the store's remotes."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._repository = CheckpointRepository(config.store_dir)

    def find(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Found:
        """Look for a checkpoint of ``model_config``. A bad one in the repository is reported and set aside.

        Raises:
            CheckpointError: the model is nothing but a checkpoint, and a bad one.
        """
        layout = layout_of(vllm_config, model_config, prefix)
        model = Path(model_config.model)
        if (model / MANIFEST_NAME).is_symlink() or (model / MANIFEST_NAME).exists():
            try:
                return Found(self._own(model, layout), is_model_itself=not has_weight_files(model))
            except CheckpointError as error:
                if not has_weight_files(model):
                    raise
                _warn_unused(error)
        try:
            key = CheckpointKey(source_of(model_config), layout)
        except ConfigError as error:
            logger.info("event=not_convertible reason=%s", error)
            return Found()
        return self._in_repository(key)

    def find_for_reload(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Checkpoint | None:
        """A checkpoint of other weights for a live module: the configuration files of the two models may differ.

        Raises:
            CheckpointError: the model is nothing but a checkpoint, and a bad one.
        """
        found = self.find(vllm_config, model_config)
        if found.checkpoint is not None or found.key is None:
            return found.checkpoint
        for candidate in self._repository.list():
            if isinstance(candidate, CheckpointError):
                continue
            manifest = candidate.manifest
            same = manifest.layout.model_copy(update={"config_digest": found.key.layout.config_digest})
            if manifest.source.fingerprint == found.key.source.fingerprint and same == found.key.layout:
                return candidate
        return None

    def set_aside(self, checkpoint: Checkpoint) -> bool:
        """Take a checkpoint that turned out to be corrupt out of use; False if it is not the repository's to move."""
        return checkpoint.path.parent == self._repository.root and self._try_set_aside(checkpoint.path.name)

    def _own(self, model: Path, layout: Layout) -> Checkpoint:
        checkpoint = open_checkpoint(model)
        check_layout(checkpoint, layout)
        return checkpoint

    def _in_repository(self, key: CheckpointKey) -> Found:
        try:
            checkpoint = self._repository.find(key)
            check_layout(checkpoint, key.layout)
            for partition in checkpoint.manifest.partitions:
                checkpoint.partition(partition.rank).open().close()
            return Found(checkpoint, key)
        except CheckpointMissing as error:
            if not (self._repository.root / key.name).exists():
                return Found(self._in_store(key), key)
            _warn_unused(error)
        except (CheckpointInvalid, CheckpointCorrupt, LayoutMismatch) as error:
            _warn_unused(error)
        except CheckpointError as error:
            _warn_unused(error)
            return Found()
        return Found(key=key) if self._try_set_aside(key.name) else Found()

    def _in_store(self, key: CheckpointKey) -> Checkpoint | None:
        """What the store's daemon can get from elsewhere: a manifest, whose partitions only the daemon can give."""
        if not self._config.store:
            return None
        try:
            with StoreClient(default_store_socket(self._config.store_dir)) as client:
                manifest = client.find(key.name).get("manifest")
            checkpoint = open_checkpoint(Path(str(manifest)).parent)
            check_layout(checkpoint, key.layout)
        except (StoreUnavailable, CheckpointMissing):
            return None
        except (StoreError, RemoteError, CheckpointError) as error:
            _warn_unused(error)
            return None
        return checkpoint

    def _try_set_aside(self, name: str) -> bool:
        try:
            logger.warning("event=checkpoint_set_aside path=%s", self._repository.set_aside(name))
        except WriteError as error:
            if not (self._repository.root / name).exists():
                return True  # another rank was faster
            logger.warning("event=checkpoint_not_set_aside reason=%s", error)
            return False
        return True


def check_layout(checkpoint: Checkpoint, wanted: Layout) -> None:
    """Hold a checkpoint's layout against the one asked for.

    Raises:
        LayoutMismatch: the message names every field that differs.
    """
    has, needs = checkpoint.manifest.layout.model_dump(), wanted.model_dump()
    differing = [field for field in needs if has[field] != needs[field]]
    if differing:
        told = ", ".join(f"{field} {has[field]} instead of {needs[field]}" for field in differing)
        path = os.path.join(checkpoint.path, MANIFEST_NAME)
        raise LayoutMismatch(path, f"it is for {told}", "convert the model again for this configuration")


def _warn_unused(error: SllmError) -> None:
    logger.warning("event=checkpoint_unused reason=%s", error)
