"""Finds the checkpoint for the model that vLLM is about to load; decides what to do if there is none, or a bad one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, Layout
from sllm_vllm.checkpoint.fingerprint import changed_since, has_weight_files, is_from_hub, scan_source
from sllm_vllm.checkpoint.reader import Checkpoint, open_checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.checkpoint.source_records import SourceRecords
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
from sllm_vllm.loader.vllm.layout import layout_of
from sllm_vllm.loader.vllm.source import Location, ModelSource, locate
from sllm_vllm.store.client import StoreClient

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class Found:
    """What the catalog found for one model: a checkpoint to load, or the source to write one from, or neither."""

    checkpoint: Checkpoint | None = None
    source: ModelSource | None = None
    layout: Layout | None = None
    is_model_itself: bool = False
    """The model has no weights but the checkpoint, so that it can't be loaded without it."""


class Catalog:
    """The checkpoints that a loader may use: in the model's own directory, the repository, and the store's remotes."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._repository = CheckpointRepository(config.store_dir)
        self._records = SourceRecords(config.store_dir)

    def find(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Found:
        """Look for a checkpoint of ``model_config``. A bad one in the repository is logged and set aside.

        Raises:
            CheckpointError: the model consists of a checkpoint only, and it can't be used.
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
            location = locate(model_config, vllm_config.load_config.download_dir)
            return self._of_source(ModelSource(location, self._records), layout)
        except ConfigError as error:
            logger.info("event=not_convertible reason=%s", error)
            return Found()

    def _of_source(self, source: ModelSource, layout: Layout) -> Found:
        """Look for a checkpoint of ``source``. Its weights are read only if there may be a checkpoint for this layout.

        Raises:
            ConfigError: the weights can't be read.
        """
        if source.files is None:
            return Found(self._of_commit(source.location, layout), source, layout)
        known = source.known()
        if known is None and not self._may_have(layout):
            return Found(source=source, layout=layout)
        return self._in_repository(CheckpointKey(known or source.identify(), layout), source)

    def _may_have(self, layout: Layout) -> bool:
        has_daemon = self._config.store and default_store_socket(self._config.store_dir).exists()
        return has_daemon or self._repository.may_have(layout)

    def _of_commit(self, location: Location, layout: Layout) -> Checkpoint | None:
        """A checkpoint of the same commit of a Hub model, for when the model's weights are not in the cache.

        Only a checkpoint whose source files came from a Hub cache counts.
        """
        for found in self._repository.list():
            if isinstance(found, CheckpointError) or found.manifest.layout != layout:
                continue
            source = found.manifest.source
            if (source.model, source.revision) == (location.model, location.commit) and is_from_hub(source.files):
                return found
        return None

    def set_aside(self, checkpoint: Checkpoint) -> bool:
        """Move a corrupt checkpoint out of the way; False if it is not in the repository, or can't be moved."""
        return checkpoint.path.parent == self._repository.root and self._try_set_aside(checkpoint.path.name)

    def _own(self, model: Path, layout: Layout) -> Checkpoint:
        checkpoint = open_checkpoint(model)
        check_layout(checkpoint, layout)
        try:
            files = scan_source(model)
        except ConfigError:
            return checkpoint  # there are no source weights to compare it with
        if has_weight_files(model):
            _check_weights(checkpoint, self._records.identify(model, files).fingerprint)
        elif changed := changed_since(files, checkpoint.manifest.source.files):
            problem = f"{', '.join(changed)} beside it changed since the conversion"
            raise LayoutMismatch(checkpoint.path / MANIFEST_NAME, problem, "convert the model again")
        return checkpoint

    def _in_repository(self, key: CheckpointKey, source: ModelSource) -> Found:
        nothing = Found(source=source, layout=key.layout)
        try:
            checkpoint = self._repository.find(key)
            _check(checkpoint, key)
            for partition in checkpoint.manifest.partitions:
                checkpoint.partition(partition.rank).open().close()
            self._repository.note_use(key.name)
            return Found(checkpoint, source, key.layout)
        except CheckpointMissing as error:
            if not (self._repository.root / key.name).exists():
                return Found(self._in_store(key), source, key.layout)
            _warn_unused(error)
        except (CheckpointInvalid, CheckpointCorrupt, LayoutMismatch) as error:
            _warn_unused(error)
        except CheckpointError as error:
            _warn_unused(error)
            return Found()
        return nothing if self._try_set_aside(key.name) else Found()

    def _in_store(self, key: CheckpointKey) -> Checkpoint | None:
        """A checkpoint that the store's daemon can fetch. Its manifest is here; its partitions come from the daemon."""
        if not self._config.store:
            return None
        try:
            with StoreClient(default_store_socket(self._config.store_dir)) as client:
                manifest = client.find(key.name).get("manifest")
            checkpoint = open_checkpoint(Path(str(manifest)).parent)
            _check(checkpoint, key)
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
                return True  # another rank has moved it
            logger.warning("event=checkpoint_not_set_aside reason=%s", error)
            return False
        return True


def check_layout(checkpoint: Checkpoint, wanted: Layout) -> None:
    """Check that a checkpoint has the layout ``wanted``.

    Raises:
        LayoutMismatch: it does not; the message names every field that differs.
    """
    has, needs = checkpoint.manifest.layout.model_dump(), wanted.model_dump()
    differing = [field for field in needs if has[field] != needs[field]]
    if differing:
        told = ", ".join(f"{field} {has[field]} instead of {needs[field]}" for field in differing)
        path = os.path.join(checkpoint.path, MANIFEST_NAME)
        raise LayoutMismatch(path, f"it is for {told}", "convert the model again for this configuration")


def _check(checkpoint: Checkpoint, key: CheckpointKey) -> None:
    check_layout(checkpoint, key.layout)
    _check_weights(checkpoint, key.source.fingerprint)


def _check_weights(checkpoint: Checkpoint, fingerprint: str) -> None:
    if checkpoint.manifest.source.fingerprint != fingerprint:
        path = os.path.join(checkpoint.path, MANIFEST_NAME)
        raise LayoutMismatch(path, "it was made from other weights", "convert the model again")


def _warn_unused(error: SllmError) -> None:
    logger.warning("event=checkpoint_unused reason=%s", error)
