"""What the store's benchmarks share: directories, checkpoints, daemons and child processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loading import page_cache
from benchmarks.loading.plain_checkpoint import NUM_LAYERS, write_plain_checkpoint
from benchmarks.store.daemon import StoreDaemon
from benchmarks.store.job import StoreAnswer, StoreJob, run_store_job
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.repository import CheckpointRepository
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT, StoreConfig
from sllm_vllm.units import MIB, round_up

Setting = int | bool | tuple[str, ...]
"""A value of ``StoreConfig``."""
SPARE_NBYTES = 512 * MIB
"""Memory of the pool beyond the checkpoint's size."""
SMALL_PAGE_SLOT_NBYTES = CHUNK_NBYTES_DEFAULT + 4096
"""Not a multiple of a huge page, which makes the daemon use 4 KiB pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSetting:
    """The setting of one run. ``scratch`` is a directory on the disk that is measured."""

    scratch: Path
    environment: Mapping[str, str]
    rounds: int
    say: Callable[[str], None]
    num_layers: int = NUM_LAYERS
    claims_memory: bool = True

    def checkpoint(self, folder: str, name: str) -> Checkpoint:
        """A checkpoint in ``scratch/folder``; written if it does not exist."""
        self.say(f"writing a checkpoint: {folder}/{name}")
        return write_plain_checkpoint(self.scratch / folder, name, num_layers=self.num_layers)

    def daemon(
        self, folder: str, *, nbytes: int, environment: Mapping[str, str] | None = None, **settings: Setting
    ) -> StoreDaemon:
        """A daemon for ``scratch/folder``, with room for ``nbytes`` in its pool."""
        fields = {"store_dir": self.scratch / folder, "slot_bytes": CHUNK_NBYTES_DEFAULT, **settings}
        config = StoreConfig.model_validate(fields)
        memory_nbytes = round_up(nbytes + SPARE_NBYTES, config.slot_bytes)
        config = config.model_copy(update={"memory_bytes": memory_nbytes})
        config.store_dir.mkdir(exist_ok=True)
        log = self.scratch / f"{folder}-daemon.log"
        return StoreDaemon(config, log=log, environment={**self.environment, **(environment or {})})

    def run_job(self, job: StoreJob, environment: Mapping[str, str] | None = None) -> StoreAnswer:
        """Do a job in its own process."""
        job = job.model_copy(update={"claims_memory": self.claims_memory})
        return run_store_job(job, self.scratch, {**self.environment, **(environment or {})})


def load_job(checkpoint: Path, store_dir: Path, **config: str) -> StoreJob:
    """A job that fills a module from a checkpoint. ``config``: settings of the loader."""
    return StoreJob(action="load", checkpoint=checkpoint, config={"store_dir": str(store_dir), **config})


def drop_pages(checkpoint: Checkpoint) -> None:
    """Drop a checkpoint's data from the page cache."""
    page_cache.prepare([partition_file(checkpoint)], "cold")


def partition_file(checkpoint: Checkpoint) -> Path:
    """The checkpoint's only data file."""
    return checkpoint.partition(0).path


def data_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's tensors."""
    return checkpoint.partition(0).record.data_nbytes


def forget_on_disk(store_dir: Path, name: str) -> None:
    """Remove what a write-behind wrote of a checkpoint, if anything."""
    repository = CheckpointRepository(store_dir)
    if (store_dir / name).exists():
        repository.remove(name)
    shutil.rmtree(store_dir / ".staging" / ".received" / name, ignore_errors=True)
