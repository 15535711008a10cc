"""Measures what the machine can do at best: read a file with O_DIRECT, copy in memory, copy to a GPU.

Copy rates are the best of a few attempts, as they are limits.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

from sllm_vllm.units import MIB, round_up

READ_NBYTES = 16 * MIB
READ_THREADS = (1, 2, 4)
COPY_NBYTES = 256 * MIB
ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits at one moment; seconds are for the whole file."""

    nbytes: int
    read_s: dict[int, float]
    """Number of threads → seconds of an O_DIRECT read of the file."""
    copy_bps: float
    """From memory to memory, with one thread."""
    device_copy_bps: float | None = None
    """From page-locked memory to the GPU."""

    @property
    def best_read_s(self) -> float:
        """Seconds to read the file with the number of threads that suits the device best."""
        return min(self.read_s.values())

    @property
    def copy_s(self) -> float:
        """Seconds to copy the file's bytes to where the weights go."""
        return self.nbytes / (self.device_copy_bps or self.copy_bps)


def measure_limits(file: Path, *, with_cuda: bool) -> Limits:
    """Measure once. Leaves the file's pages in the page cache as they are."""
    return Limits(
        nbytes=file.stat().st_size,
        read_s={count: read_direct_s(file, count) for count in READ_THREADS},
        copy_bps=_best_bps(_copy_in_memory()),
        device_copy_bps=_best_bps(_copy_to_device()) if with_cuda else None,
    )


def read_direct_s(file: Path, num_threads: int) -> float:
    """Seconds to read a whole file with O_DIRECT, in pieces of 16 MiB; each thread takes the next piece.

    Raises:
        OSError: the file system does not support O_DIRECT, or the device failed.
    """
    nbytes = file.stat().st_size
    offsets = iter(range(0, nbytes, READ_NBYTES))
    lock, errors = threading.Lock(), list[OSError]()
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read(buffer: mmap.mmap) -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            wanted = min(READ_NBYTES, nbytes - offset)
            view = memoryview(buffer)[: round_up(wanted, mmap.PAGESIZE)]
            try:
                if os.preadv(fd, [view], offset) < wanted:
                    raise OSError(f"{file}: a short read at {offset}")
            except OSError as error:
                errors.append(error)
                return

    try:
        buffers = [_touched(READ_NBYTES) for _ in range(num_threads)]
        threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
    finally:
        os.close(fd)
    if errors:
        raise errors[0]
    return seconds


def _touched(nbytes: int) -> mmap.mmap:
    """Page-aligned memory whose pages are already allocated."""
    buffer = mmap.mmap(-1, nbytes)
    buffer.write(bytes(nbytes))
    return buffer


def _best_bps(copy: Callable[[], None]) -> float:
    copy()
    best_s = float("inf")
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        copy()
        best_s = min(best_s, time.perf_counter() - start)
    return COPY_NBYTES / best_s


def _copy_in_memory() -> Callable[[], None]:
    source, target = (numpy.ones(COPY_NBYTES, dtype=numpy.uint8) for _ in range(2))
    return lambda: numpy.copyto(target, source)


def _copy_to_device() -> Callable[[], None]:
    import torch

    source = torch.ones(COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_NBYTES, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return copy
