"""The source weights of a load: where they are, what identifies them, and whether they changed during the load."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import vllm.envs
from huggingface_hub import try_to_load_from_cache
from torch import nn
from vllm.config import ModelConfig
from vllm.logger import init_logger

from sllm_vllm.checkpoint.core.manifest import Source
from sllm_vllm.checkpoint.fingerprint import SourceFile, hub_snapshot_of, links_on, scan_source
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.source_records import Effort, Identified, SourceRecords
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import ConfigError, SourceChanged, SourceMissing
from sllm_vllm.units import KIB

logger = init_logger(f"vllm.{__name__}")

_TOLD_MAX = 3


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model's files are.

    Attributes:
        model: the model's name on the Hub, or its directory.
        commit: for a model in the Hugging Face cache, its commit.
        ref: for a model loaded by its Hub name, the cache's file that holds the commit.
    """

    model: str
    directory: Path
    commit: str | None = None
    ref: Path | None = field(default=None, compare=False)

    def is_current(self) -> bool:
        """Whether the model's name still refers to ``commit``; a download may have changed that."""
        with contextlib.suppress(OSError, ValueError):
            return self.ref is None or read_plain(self.ref, KIB).decode().strip() == self.commit
        return True  # without a ref file, the revision is itself a commit


def locate(model_config: ModelConfig, download_dir: str | None = None) -> Location:
    """Where the stock loader finds the weights, or will download them to.

    Raises:
        ConfigError: the weights can't be identified, or the model is not on this machine yet.
    """
    model = model_config.model
    if getattr(model_config, "model_weights", ""):
        raise ConfigError(f"{model_config.model_weights}: weights in an object store have no fingerprint here")
    if os.path.isdir(model):
        place = hub_snapshot_of(Path(model).absolute())
        return (
            Location(str(Path(model).resolve()), Path(model))
            if place is None
            else Location(place[0], Path(model), place[1])
        )
    if vllm.envs.VLLM_USE_MODELSCOPE:
        raise ConfigError(f"{model}: weights from ModelScope are known by their directory alone; give that")
    config = None
    with contextlib.suppress(ValueError):  # raised for names that the Hub does not allow
        config = try_to_load_from_cache(model, "config.json", revision=model_config.revision)
    if not isinstance(config, str):
        raise ConfigError(f"{model}: it is not in the Hugging Face cache yet")
    snapshot = Path(config).parent
    directory = snapshot
    if download_dir is not None:
        directory = Path(download_dir, snapshot.parent.parent.name, "snapshots", snapshot.name)
    ref = directory.parent.parent / "refs" / (model_config.revision or "main")
    return Location(model, directory, snapshot.name, ref)


class ModelSource:
    """The source weights of one model, as they were when this object was made. Used by one load.

    ``files`` is None while the weights are not downloaded.
    """

    def __init__(self, location: Location, records: SourceRecords) -> None:
        self.location = location
        self._records = records
        self._links = links_on(location.directory)
        self.files = self._scan()
        self._reading: _Reading | None = None

    def known(self) -> Source | None:
        """Identify the weights without reading them; None if they would have to be read, or are not there.

        Raises:
            ConfigError: a file can't be read.
        """
        if self.files is None:
            return None
        identified = self._records.known(self.location.directory, self.files)
        return None if identified is None else self._told(identified)

    def identify(self) -> Source:
        """Identify the weights, reading the files that have changed or were never read.

        Raises:
            ConfigError: a file can't be read, or is written to meanwhile.
        """
        return self._identify("unknown")

    def start_reading(self, *, afresh: bool) -> None:
        """Begin to identify the weights in a thread, during a load; with ``afresh`` every byte is read."""
        if self.files is not None:
            self._reading = _Reading(lambda: self._identify("all" if afresh else "unknown"))

    def finish_reading(self) -> Source:
        """Identify the weights that were loaded. Called after the load.

        Raises:
            ConfigError: a file can't be read, or was written to meanwhile.
        """
        before = self.files
        if self._reading is None:  # the load has downloaded the weights, or nothing was read during it
            self.files = self._scan()
            source = self._identify("unknown")
        else:
            source = self._reading.result()
        is_same = before is None or (self._scan() == before and links_on(self.location.directory) == self._links)
        if self.files is None or not is_same or not self.location.is_current():
            raise ConfigError(f"{self.location.directory}: its weights changed while they were loaded")
        return source

    def require_unchanged(self, source: Source) -> None:
        """Check after a conversion that the weights were ``source`` throughout.

        Reads the files that so far were identified only by their names in a Hub cache.

        Raises:
            ConfigError: the weights have changed, or can't be read.
        """
        if self.finish_reading().fingerprint != source.fingerprint or not self.has_content_of_names(source):
            raise ConfigError(f"{self.location.directory}: its weights changed while they were loaded; convert again")

    def require(self, checkpoint: Checkpoint) -> None:
        """Check that the weights read during the load of ``checkpoint`` are those it was made from.

        Raises:
            SourceChanged: they differ, or can't be read.
        """
        fix = "start again: the weights as they are now are loaded then"
        try:
            fingerprint = self.finish_reading().fingerprint
        except ConfigError as error:
            raise SourceChanged(self.location.directory, str(error), fix) from None
        if fingerprint != checkpoint.manifest.source.fingerprint:
            problem = f"its weights are other ones than those that {checkpoint.path} was made from"
            raise SourceChanged(self.location.directory, problem, fix)

    def has_content_of_names(self, source: Source) -> bool:
        """Whether files identified by their names in a Hub cache hold what the names stand for; reads these files."""
        if self.files is None or all(file.blob is None for file in self.files):
            return True
        try:
            return self._identify("named").fingerprint == source.fingerprint
        except ConfigError as error:
            logger.warning("event=source_unreadable reason=%s", error)
            return False

    def _scan(self) -> tuple[SourceFile, ...] | None:
        try:
            return scan_source(self.location.directory)
        except SourceMissing:
            if self.location.commit is None:
                raise
            return None

    def _identify(self, effort: Effort) -> Source:
        if self.files is None:
            raise ConfigError(f"{self.location.directory}: its weights are not there")
        return self._told(self._records.identify(self.location.directory, self.files, effort=effort))

    def _told(self, identified: Identified) -> Source:
        if identified.changed:
            names = ",".join(identified.changed[:_TOLD_MAX])
            logger.warning(
                "event=source_changed model=%s num_files=%d files=%s",
                self.location.model,
                len(identified.changed),
                names,
            )
        if identified.seconds > 1:
            logger.info(
                "event=source_read model=%s nbytes=%d seconds=%.1f",
                self.location.model,
                identified.nbytes_read,
                identified.seconds,
            )
        return Source(
            model=self.location.model,
            revision=self.location.commit,
            fingerprint=identified.fingerprint,
            files=list(identified.files),
        )


class _Reading:
    """Runs a call in a daemon thread and keeps its result."""

    def __init__(self, call: Callable[[], Source]) -> None:
        self._call = call
        self._result: Source | ConfigError | None = None
        self._thread = threading.Thread(target=self._run, name="sllm-source", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except ConfigError as error:
            self._result = error

    def result(self) -> Source:
        self._thread.join()
        assert self._result is not None, "the thread died of another error"
        if isinstance(self._result, ConfigError):
            raise self._result
        return self._result


def source_of(model_config: ModelConfig, records: SourceRecords) -> Source:
    """Identify the source weights of a model on this machine.

    Raises:
        ConfigError: they are not on this machine, can't be read, or are written to meanwhile.
    """
    return ModelSource(locate(model_config), records).identify()


def require_weights_here(module: nn.Module, model_config: ModelConfig) -> None:
    """Raise if a module was also filled from another model's files, whose changes would not be noticed.

    Raises:
        ConfigError: the module has weights from another model.
    """
    for source in getattr(module, "secondary_weights", ()):
        if source.model_or_path != model_config.model:
            raise ConfigError(f"{model_config.model}: some of its weights are loaded from {source.model_or_path}")
