"""Measures the speed of a store's disk by depth (concurrent reads or writes) and chunk size, for the daemon.

``store calibrate`` measures; the daemon reads the result when it starts. Transfers bypass the page cache where the file
system allows it. Each figure is the best of a few rounds, each limited in bytes and time. The rounds of all figures are
interleaved, so that a disturbance of a few seconds does not affect only one figure.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import math
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sllm_vllm.checkpoint.core.manifest import DATA_ALIGNMENT
from sllm_vllm.checkpoint.writer import write_errors, write_file_durably
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.errors import ConfigError
from sllm_vllm.units import MIB

CALIBRATION_NAME = "calibration.json"
CALIBRATION_NBYTES_MAX = 1 * MIB
CLOSE_ENOUGH = 0.97
"""A smaller depth is preferred if it reaches this share of the best rate: it leaves more of the machine to others."""


Move = Callable[[int, list[memoryview], int], int]
"""``os.preadv`` or ``os.pwritev``."""


class _CalibrationRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_CalibrationRecord):
    """One measurement: ``depth`` concurrent requests of ``chunk_nbytes`` transferred ``bps`` bytes per second."""

    depth: int = Field(ge=1, le=64)
    chunk_nbytes: int = Field(ge=DATA_ALIGNMENT)
    bps: float = Field(gt=0, allow_inf_nan=False)


class Calibration(_CalibrationRecord):
    """The measurements of a device, and the depths to use for it: ``readers`` and ``writers``."""

    device: int = Field(description="st_dev of the measured disk")
    measured_at: datetime.datetime
    file: str = Field(description="file that was read; empty for a temporary file")
    is_direct: bool = Field(description="whether the reads bypassed the page cache")
    reads: tuple[Figure, ...] = Field(min_length=1, max_length=64)
    writes: tuple[Figure, ...] = Field(min_length=1, max_length=64)
    readers: int = Field(ge=1, le=64)
    writers: int = Field(ge=1, le=16)

    @property
    def read_bps(self) -> float:
        """Best read rate in bytes per second."""
        return max(figure.bps for figure in self.reads)

    @property
    def write_bps(self) -> float:
        """Best write rate in bytes per second."""
        return max(figure.bps for figure in self.writes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePlan:
    """What to measure, and limits for it. Sizes are multiples of 4096."""

    sample_nbytes: int = 512 * MIB
    read_depths: tuple[int, ...] = (1, 2, 4, 8)
    read_chunks: tuple[int, ...] = (4 * MIB, 16 * MIB)
    write_depths: tuple[int, ...] = (1, 2)
    write_chunk: int = 16 * MIB
    round_s_max: float = 2.0
    rounds: int = 2


def read_calibration(state_dir: Path) -> Calibration | None:
    """Return the last calibration; None if there is none or its file can't be read."""
    try:
        return Calibration.model_validate_json(read_plain(state_dir / CALIBRATION_NAME, CALIBRATION_NBYTES_MAX))
    except (OSError, ValidationError):
        return None


def largest_partition(store_dir: Path, nbytes_min: int) -> Path | None:
    """Return the store's largest partition file of at least ``nbytes_min``, if any. Ties go to the first path."""
    found = []
    for path in store_dir.glob("[!.]*/partitions/*.safetensors"):
        with contextlib.suppress(OSError):  # it is being removed
            found.append((-path.stat().st_size, path))
    return min(found)[1] if found and -min(found)[0] >= nbytes_min else None


def plan_depth(figures: Sequence[Figure]) -> int:
    """Return the smallest depth that reaches ``CLOSE_ENOUGH`` of the best rate at any chunk size."""
    enough = CLOSE_ENOUGH * max(figure.bps for figure in figures)
    return min(figure.depth for figure in figures if figure.bps >= enough)


def measure_device(state_dir: Path, file: Path | None, plan: MeasurePlan) -> Calibration:
    """Measure a device and save the result in ``state_dir``.

    Args:
        file: the file to read; None to read a temporary file, written to ``state_dir`` first.

    Raises:
        ConfigError: ``file`` is not a regular file, or is smaller than a chunk. OSError: it can't be read.
        WriteError: ``state_dir`` can't be written, or the device is full.
    """
    with write_errors(state_dir):
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_space(state_dir, 2 * plan.sample_nbytes)
    with _open_sample(file, plan) if file is not None else _make_sample(state_dir, plan) as sample:
        device = os.fstat(sample.fd).st_dev
        reads = _measure_reads(sample, plan)
        with write_errors(state_dir):
            writes = _measure_writes(state_dir, plan)
    calibration = Calibration(
        device=device,
        measured_at=datetime.datetime.now(datetime.UTC),
        file=str(file or ""),
        is_direct=sample.is_direct,
        reads=reads,
        writes=writes,
        readers=plan_depth(reads),
        writers=plan_depth(writes),
    )
    write_file_durably(state_dir / CALIBRATION_NAME, calibration.model_dump_json(indent=2).encode() + b"\n")
    return calibration


@dataclass(frozen=True, slots=True)
class _Sample:
    """An open file, and how many bytes of it to transfer."""

    fd: int
    nbytes: int
    is_direct: bool


@contextlib.contextmanager
def _open_sample(file: Path, plan: MeasurePlan) -> Iterator[_Sample]:
    facts, largest = file.stat(), max(plan.read_chunks)
    nbytes = min(facts.st_size, plan.sample_nbytes) // largest * largest
    if not stat.S_ISREG(facts.st_mode) or nbytes == 0:
        raise ConfigError(f"{file}: it must be a file of at least {largest} bytes")
    fd, is_direct = _open_direct(file, os.O_RDONLY)
    try:
        yield _Sample(fd, nbytes, is_direct)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _make_sample(state_dir: Path, plan: MeasurePlan) -> Iterator[_Sample]:
    """Open a temporary file that is already unlinked, and fill it."""
    with _open_nameless(state_dir, plan.sample_nbytes) as sample:
        with write_errors(state_dir):
            _write_round(sample, max(plan.write_depths), plan.write_chunk, s_max=math.inf)
        yield sample


@contextlib.contextmanager
def _open_nameless(state_dir: Path, nbytes: int) -> Iterator[_Sample]:
    """Open an empty file that is already unlinked, so that it vanishes when the process ends for any reason."""
    path = state_dir / f".calibrate.{os.getpid()}"
    try:
        fd, is_direct = _open_direct(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    finally:
        path.unlink(missing_ok=True)
    try:
        yield _Sample(fd, nbytes, is_direct)
    finally:
        os.close(fd)


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open a file. Returns its descriptor, and whether it bypasses the page cache, which not all file systems allow."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o600), False


def _require_space(directory: Path, nbytes: int) -> None:
    usage = os.statvfs(directory)
    if usage.f_bavail * usage.f_frsize < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _measure_reads(sample: _Sample, plan: MeasurePlan) -> tuple[Figure, ...]:
    def measure(depth: int, chunk_nbytes: int) -> float:
        os.posix_fadvise(sample.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # for file systems without O_DIRECT
        return _transfer(os.preadv, sample, _buffers(depth, chunk_nbytes), s_max=plan.round_s_max)

    return _best(list(itertools.product(plan.read_depths, plan.read_chunks)), measure, plan.rounds)


def _measure_writes(state_dir: Path, plan: MeasurePlan) -> tuple[Figure, ...]:
    def measure(depth: int, chunk_nbytes: int) -> float:
        with _open_nameless(state_dir, plan.sample_nbytes) as sample:  # a new file, as when a checkpoint is written
            return _write_round(sample, depth, chunk_nbytes, s_max=plan.round_s_max)

    return _best([(depth, plan.write_chunk) for depth in plan.write_depths], measure, plan.rounds)


def _best(cases: Sequence[tuple[int, int]], measure: Callable[[int, int], float], rounds: int) -> tuple[Figure, ...]:
    best = dict.fromkeys(cases, 0.0)
    for _ in range(rounds):
        for case in cases:
            best[case] = max(best[case], measure(*case))
    return tuple(Figure(depth=depth, chunk_nbytes=nbytes, bps=bps) for (depth, nbytes), bps in best.items())


def _write_round(sample: _Sample, depth: int, chunk_nbytes: int, *, s_max: float) -> float:
    buffers = _buffers(depth, chunk_nbytes)
    for buffer in buffers:
        buffer[:] = os.urandom(chunk_nbytes)  # zeros might never reach the device
    return _transfer(os.pwritev, sample, buffers, s_max=s_max)


def _buffers(depth: int, chunk_nbytes: int) -> list[memoryview]:
    """Allocate page-aligned buffers and touch their pages, so that page faults are not measured."""
    buffers = [memoryview(mmap.mmap(-1, chunk_nbytes)) for _ in range(depth)]
    for buffer in buffers:
        buffer[:] = bytes(chunk_nbytes)
    return buffers


def _transfer(move: Move, sample: _Sample, buffers: Sequence[memoryview], *, s_max: float) -> float:
    """Transfer the sample's chunks in order, with one thread per buffer, for at most about ``s_max`` seconds.

    Returns bytes per second; for writes, the time includes the final sync.
    """
    offsets = iter(range(0, sample.nbytes, len(buffers[0])))  # shared by all threads: `next` on it is atomic
    start_s = time.perf_counter()

    def work(buffer: memoryview) -> int:
        nbytes = 0
        for offset in offsets:
            nbytes += move(sample.fd, [buffer], offset)
            if time.perf_counter() - start_s > s_max:
                break
        return nbytes

    with ThreadPoolExecutor(len(buffers)) as pool:
        nbytes = sum(pool.map(work, buffers))
    if move is os.pwritev:
        os.fdatasync(sample.fd)
    return nbytes / (time.perf_counter() - start_s)
