"""Writes a loaded module's tensors to a repository. Needs torch alone."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping

import torch

from sllm_vllm.checkpoint.repository import Staging
from sllm_vllm.checkpoint.writer import WrittenPartition, write_partition
from sllm_vllm.errors import WriteError
from sllm_vllm.loader.module_state import storable_tensors

logger = logging.getLogger(f"vllm.{__name__}")


def save_state(
    staging: Staging,
    rank: int,
    state: Mapping[str, torch.Tensor],
    *,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> bool:
    """Write a rank's tensors durably, and publish the checkpoint if this is the last rank.

    Returns:
        Whether the checkpoint is published.

    Raises:
        WriterBusy: another process is writing this partition.
        WriteError: the partition can't be written.
    """
    with staging.writer(rank) as needed:
        if needed:
            staging.commit(_write(staging, rank, state, on_progress=on_progress))
    return staging.publish()


def save_state_behind(
    staging: Staging, rank: int, state: Mapping[str, torch.Tensor], *, is_sound: Callable[[], bool] = lambda: True
) -> None:
    """Write a rank's tensors now, before vLLM packs them; sync and publish in another thread.

    The bytes are in the page cache when this returns, so that the engine need not wait for the disk. If the process
    dies before the thread is done, nothing is published and nothing is lost.

    Args:
        is_sound: called in that thread; if it returns False, the written partition is discarded.

    Raises:
        WriterBusy: another process is writing this partition.
        WriteError: the partition can't be written.
    """
    with contextlib.ExitStack() as stack:
        needed = stack.enter_context(staging.writer(rank))
        written = _write(staging, rank, state, on_progress=lambda nbytes: None) if needed else None
        held = stack.pop_all()

    def finish() -> None:
        try:
            with held:
                if written is not None and not is_sound():
                    written.discard()
                    logger.warning("event=checkpoint_dropped rank=%d path=%s", rank, staging.target)
                    return
                if written is not None:
                    staging.commit(written)
            published = staging.publish()
            logger.info("event=checkpoint_written rank=%d published=%s path=%s", rank, published, staging.target)
        except WriteError as error:
            logger.warning("event=checkpoint_not_written rank=%d reason=%s", rank, error)

    threading.Thread(target=finish, name="sllm-sync", daemon=False).start()


def _write(
    staging: Staging, rank: int, state: Mapping[str, torch.Tensor], *, on_progress: Callable[[int], None]
) -> WrittenPartition:
    tensors = storable_tensors(state, str(staging.target))
    return write_partition(staging.path, rank, tensors, chunk_nbytes=staging.chunk_nbytes, on_progress=on_progress)
