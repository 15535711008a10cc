"""Converts a model: starts one process per rank, watches the processes, and publishes the result.

Imports neither vLLM nor torch; the ranks' processes run ``rank.py``. Each sends events over a pipe. However this
process ends, the ranks notice and end, too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, first_problem
from sllm_vllm.checkpoint.fingerprint import has_weight_files
from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
from sllm_vllm.convert.model_files import copy_model_files, put_in_place, require_free, workplace
from sllm_vllm.errors import ConfigError, SllmError

Stage = Literal["read", "write", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """What to convert, and for which configuration; fields are named as in vLLM.

    ``out`` is the directory to make; None to convert into the store.
    """

    model: str
    store_dir: Path
    out: Path | None = None
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chunk_nbytes: int = CHUNK_NBYTES_DEFAULT
    compared: Path | None = None
    """If set, write nothing, but compare this checkpoint with what would be written."""


@dataclass(frozen=True, slots=True)
class RankJob:
    """One rank's share of a conversion.

    Attributes:
        run_dir: the ranks' temporary directory; removed afterwards.
        root: the directory in which checkpoints are found and written.
        model_files: where to put the files that make the checkpoint a model directory; None if it stays in the store.
    """

    request: ConvertRequest
    rank: int
    run_dir: Path
    root: Path
    model_files: Path | None


@dataclass(frozen=True, slots=True)
class StageBegun:
    """A rank began a stage. ``nbytes`` is the size of its work; None if unknown."""

    rank: int
    stage: Stage
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class BytesDone:
    """A rank has done ``nbytes`` more of its current stage."""

    rank: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RankDone:
    """A rank is done.

    Attributes:
        outcome: ``found`` if the whole checkpoint existed already, ``kept`` if an earlier conversion had written this
            partition, ``written`` if this one did, ``compared`` if the partition was compared with the source.
        dtype: the ``--dtype`` that vLLM needs to load the checkpoint; None for ``auto``.
        differing: tensors that differ from the source.
    """

    rank: int
    checkpoint: Path
    outcome: Literal["found", "kept", "written", "compared"]
    dtype: str | None = None
    differing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A rank failed. ``reason`` is one line; ``is_known`` if it needs no further details from the rank's log."""

    rank: int
    reason: str
    is_known: bool


Event = StageBegun | BytesDone | RankDone | RankFailed


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion. ``outcomes`` has one entry per rank, in order; for the rest see ``RankDone``."""

    checkpoint: Path
    outcomes: tuple[str, ...]
    dtype: str | None
    differing: tuple[str, ...] = ()

    @property
    def was_found(self) -> bool:
        """Whether the checkpoint existed before."""
        return "found" in self.outcomes


def convert_model(request: ConvertRequest, on_event: Callable[[Event], None] = lambda event: None) -> Converted:
    """Convert a model, continuing where an earlier conversion stopped.

    Raises:
        ConfigError: there is nothing to convert.
        SllmError: the conversion failed.
    """
    _require_source(request.model)
    if request.out is None:
        return run_ranks(request, request.store_dir, None, on_event=on_event)
    target = request.out.expanduser().absolute()
    if not (target / MANIFEST_NAME).exists():
        require_free(target)
    with workplace(target, "converting", keep="rank-*.safetensors") as root:
        model_files = root / ".model"
        converted = run_ranks(request, root, model_files, on_event=on_event)
        if not converted.was_found or converted.checkpoint != target:
            copy_model_files(model_files, converted.checkpoint)
            put_in_place(converted.checkpoint, target)
    return Converted(target, converted.outcomes, converted.dtype)


def compare_with_source(
    checkpoint: Checkpoint, model: str, *, trust_remote_code: bool = False, on_event: Callable[[Event], None]
) -> tuple[str, ...]:
    """Load ``model`` as for a conversion and compare every tensor of ``checkpoint`` with it.

    Returns:
        The tensors that differ, are missing in the checkpoint, or are not in the model, with their ranks.

    Raises:
        ConfigError: the checkpoint is not of the tensor-parallel kind that conversions make.
        SllmError: the model can't be loaded.
    """
    layout = checkpoint.manifest.layout
    if layout.num_partitions != layout.tensor_parallel_size:
        raise ConfigError(f"{checkpoint.path}: only tensor-parallel checkpoints can be compared with their source")
    _require_source(model)
    request = ConvertRequest(
        model=model,
        store_dir=checkpoint.path.parent,
        tensor_parallel_size=layout.tensor_parallel_size,
        dtype=layout.dtype,
        trust_remote_code=trust_remote_code,
        compared=checkpoint.path,
    )
    return run_ranks(request, checkpoint.path.parent, None, on_event=on_event).differing


def _require_source(model: str) -> None:
    path = Path(model)
    if not path.is_dir():
        if model.startswith(("/", ".", "~")):
            raise ConfigError(f"{model}: there is no such directory; give a model's directory or its name on the Hub")
    elif (path / MANIFEST_NAME).exists() and not has_weight_files(path):
        raise ConfigError(f"{model}: it is a checkpoint already; give the model it was made from")


def run_ranks(
    request: ConvertRequest, root: Path, model_files: Path | None, *, on_event: Callable[[Event], None]
) -> Converted:
    """Convert, or compare, with one process per rank and checkpoints in ``root``.

    Raises:
        SllmError: a rank failed.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="sllm-convert-"))
    jobs = [RankJob(request, rank, run_dir, root, model_files) for rank in range(request.tensor_parallel_size)]
    keeps_logs = False
    try:
        with started_ranks(jobs) as running:
            done = watch_ranks(running, on_event)
    except RanksFailed as failure:
        keeps_logs = not failure.is_known
        story = f"; the whole story: {log_path(jobs[failure.rank])}" if keeps_logs else ""
        raise SllmError(f"{failure.reason}{story}") from None
    finally:
        if not keeps_logs:
            shutil.rmtree(run_dir, ignore_errors=True)
    ranks = sorted(done, key=lambda rank: rank.rank)
    differing = tuple(f"{name} (rank {rank.rank})" for rank in ranks for name in rank.differing)
    return Converted(ranks[0].checkpoint, tuple(rank.outcome for rank in ranks), ranks[0].dtype, differing)


def log_path(job: RankJob) -> Path:
    """The file with everything that a rank's process prints, vLLM's output included."""
    return job.run_dir / f"rank-{job.rank}.log"


@dataclass(slots=True)
class RunningRank:
    """A rank's process, and the pipe on which it sends events."""

    rank: int
    process: multiprocessing.process.BaseProcess
    events: Connection


class RanksFailed(Exception):
    """A rank failed; ``str()`` says why."""

    def __init__(self, failed: RankFailed) -> None:
        self.rank, self.reason, self.is_known = failed.rank, failed.reason, failed.is_known
        super().__init__(failed.reason)


@contextlib.contextmanager
def started_ranks(jobs: list[RankJob]) -> Iterator[list[RunningRank]]:
    """Start the ranks' processes; those still running at the end of the block are killed."""
    context = multiprocessing.get_context("spawn")
    running: list[RunningRank] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(job, theirs), name=f"rank-{job.rank}", daemon=True)
            process.start()
            theirs.close()
            running.append(RunningRank(job.rank, process, ours))
        yield running
    finally:
        for rank in running:
            rank.process.kill()
            rank.process.join()
            rank.events.close()


def watch_ranks(running: list[RunningRank], on_event: Callable[[Event], None]) -> list[RankDone]:
    """Pass the ranks' events on until all ranks are done.

    Raises:
        RanksFailed: a rank failed.
    """
    waiting, done = {rank.events: rank for rank in running}, list[RankDone]()
    while waiting:
        for events in multiprocessing.connection.wait(list(waiting)):
            assert isinstance(events, Connection)
            rank = waiting[events]
            event = _receive(rank)
            if isinstance(event, RankFailed):
                raise RanksFailed(_cause(event, running))
            if event is None:
                del waiting[events]
            elif isinstance(event, RankDone):
                done.append(event)
            if event is not None:
                on_event(event)
    return done


def _receive(rank: RunningRank) -> Event | None:
    """The rank's next event; None if its process ended without an error."""
    try:
        event: Event = rank.events.recv()
    except (EOFError, OSError):
        rank.process.join()
        return RankFailed(rank.rank, _death(rank), is_known=False) if rank.process.exitcode else None
    return event


def _cause(failed: RankFailed, running: list[RunningRank]) -> RankFailed:
    """The failure to report: that of a killed rank, if any, because it makes the others fail, too."""
    for rank in running:
        if rank.process.exitcode is not None and rank.process.exitcode < 0:
            return RankFailed(rank.rank, _death(rank), is_known=False)
    return failed


def _death(rank: RunningRank) -> str:
    code = rank.process.exitcode or 0
    if code >= 0:
        return f"rank {rank.rank} ended with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"rank {rank.rank} was killed by {signal.Signals(-code).name}{hint}"


def _run_rank(job: RankJob, events: Connection) -> None:
    """The main function of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, name="sllm-lifeline", daemon=True).start()
    _print_to(log_path(job))
    tempfile.tempdir = str(job.run_dir)  # vLLM leaves sockets in the temporary directory
    try:
        from sllm_vllm.convert.rank import convert_rank

        convert_rank(job, events.send)
    except SllmError as error:
        events.send(RankFailed(job.rank, str(error), is_known=True))
        raise
    except BaseException as error:
        text = first_problem(error) if isinstance(error, ValidationError) else " ".join(str(error).split())[:300]
        reason = f"{job.request.model}: rank {job.rank} failed: {type(error).__name__}: {text}"
        traceback.print_exc()  # before sending the event, after which the parent kills this process
        sys.stdout.flush()
        events.send(RankFailed(job.rank, reason, is_known=False))
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _print_to(path: Path) -> None:
    """Redirect everything this process prints, including output of native code, to a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
