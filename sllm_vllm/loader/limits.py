"""How fast each hop of a load is alone on this machine: measured once and stored beside the checkpoints."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sllm_vllm.checkpoint.checksum import checksum
from sllm_vllm.checkpoint.chunk_file import ChunkFile
from sllm_vllm.checkpoint.writer import write_file_durably
from sllm_vllm.config import CHUNK_NBYTES_DEFAULT
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.loader.report import HopName
from sllm_vllm.units import KIB, MIB

LIMITS_NAME = ".limits.json"
_SAMPLE_NBYTES_MAX = 512 * MIB
_ROUNDS = 3


def read_limits(store_dir: Path) -> dict[HopName, float]:
    """Bytes per second of each hop as last measured for this store; empty if never measured."""
    try:
        value = json.loads(read_plain(store_dir / LIMITS_NAME, 64 * KIB))
        return {name: float(bps) for name, bps in value.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def measure_limits(file: Path, store_dir: Path, *, num_threads: int) -> dict[HopName, float]:
    """Measure every hop with the bytes of ``file`` (a partition), best of a few rounds, and store the result.

    Raises:
        OSError: the file can't be read, or is smaller than a chunk.
        WriteError: the store's directory can't be written.
    """
    nbytes = min(file.stat().st_size, _SAMPLE_NBYTES_MAX) // CHUNK_NBYTES_DEFAULT * CHUNK_NBYTES_DEFAULT
    if nbytes == 0:
        raise OSError(f"{file} is smaller than a chunk of {CHUNK_NBYTES_DEFAULT} bytes")
    limits: dict[HopName, float] = {
        "read_disk": _best_bps(nbytes, lambda: _read(file, nbytes, num_threads), before=lambda: _drop(file)),
        "read_cache": _best_bps(nbytes, lambda: _read(file, nbytes, num_threads), before=lambda: _warm(file)),
    }
    buffer = memoryview(bytearray(CHUNK_NBYTES_DEFAULT))
    limits["verify"] = num_threads * _best_bps(len(buffer), lambda: checksum(buffer))
    if torch.cuda.is_available():
        limits["copy"] = _host_to_device_bps()
    write_file_durably(store_dir / LIMITS_NAME, json.dumps(limits).encode())
    return limits


def _best_bps(nbytes: int, action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    best_s = float("inf")
    for _ in range(_ROUNDS):
        before()
        start = time.perf_counter()
        action()
        best_s = min(best_s, time.perf_counter() - start)
    return nbytes / best_s


def _read(path: Path, nbytes: int, num_threads: int) -> None:
    with (
        ChunkFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path)) as file,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        buffers = [memoryview(mmap.mmap(-1, CHUNK_NBYTES_DEFAULT)) for _ in range(num_threads)]

        def read_every(first: int) -> None:
            for offset in range(first * CHUNK_NBYTES_DEFAULT, nbytes, num_threads * CHUNK_NBYTES_DEFAULT):
                file.read_into(buffers[first], offset, CHUNK_NBYTES_DEFAULT)

        list(pool.map(read_every, range(num_threads)))


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK_NBYTES_DEFAULT):
            pass


def _host_to_device_bps() -> float:
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")

    def copy() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    return _best_bps(host.numel(), copy)
