"""Measures how much of a file is in the page cache, and loads or drops its pages. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy

from sllm_vllm.units import MIB

Tier = Literal["warm", "cold"]

WARM_MIN = 0.99
COLD_MAX = 0.01
ATTEMPTS_MAX = 5
_READ_NBYTES = 16 * MIB


class PageCacheRefused(Exception):
    """The system does not keep the pages, or does not drop them."""


def residency(paths: Iterable[Path]) -> float:
    """Share of the files' bytes that is in memory, according to ``mincore``."""
    pages = [_resident_pages(path) for path in paths]
    total = sum(count for _, count in pages)
    return sum(resident for resident, _ in pages) / total if total else 1.0


def prepare(paths: Iterable[Path], tier: Tier) -> float:
    """Bring the files into memory (``warm``) or drop them from it (``cold``), if necessary; returns their residency.

    Raises:
        PageCacheRefused: ``ATTEMPTS_MAX`` attempts did not succeed.
    """
    files = list(paths)
    for _ in range(ATTEMPTS_MAX + 1):
        share = residency(files)
        if (share >= WARM_MIN) if tier == "warm" else (share <= COLD_MAX):
            return share
        for file in files:
            _read(file) if tier == "warm" else _drop(file)
    raise PageCacheRefused(f"{share:.1%} of {', '.join(map(str, files))} is in memory, which is not {tier}")


def _read(path: Path) -> None:
    buffer = bytearray(_READ_NBYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop(path: Path) -> None:
    """Drop a file's pages. Only clean pages can be dropped, hence the fsync."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _resident_pages(path: Path) -> tuple[int, int]:
    """Number of a file's pages in memory, and of all its pages."""
    nbytes = path.stat().st_size
    count = -(-nbytes // mmap.PAGESIZE)
    if count == 0:
        return 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = numpy.frombuffer(mapping, dtype=numpy.uint8)
        flags = numpy.zeros(count, dtype=numpy.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), ctypes.c_void_p(flags.ctypes.data)
        )
        del view
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((flags & 1).sum()), count
