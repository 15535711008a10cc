"""Reads a partition's file chunk by chunk, each chunk in the fastest way the system offers.

A chunk that is in the page cache is copied from it; any other chunk is read with O_DIRECT, bypassing the cache, at the
device's own speed. The kernel is asked for every chunk whether it is cached (``preadv2`` with ``RWF_NOWAIT``).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from types import TracebackType
from typing import Literal, Self

from sllm_vllm.checkpoint.core.manifest import DATA_ALIGNMENT
from sllm_vllm.errors import CheckpointCorrupt
from sllm_vllm.units import round_up

logger = logging.getLogger(f"vllm.{__name__}")

Tier = Literal["cache", "disk"]


class ChunkFile:
    """Reads ranges of one file. Owns its descriptors; several threads may read at once.

    Args:
        fd: descriptor opened for reading. The object takes ownership and closes it.
        path: the file's path, used in messages.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self.status = os.fstat(fd)
        self._fd = fd
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # otherwise probing for cached pages starts readahead
        self._falling_back = threading.Lock()
        self._reads_direct = True
        self._direct_fd = self._open_direct()

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> Tier:
        """Fill ``buffer[:nbytes]`` from ``offset``, and return where the last bytes came from.

        Args:
            buffer: page-aligned, with room for ``nbytes`` rounded up to 4096.
            offset: position in the file, a multiple of 4096.

        Raises:
            CheckpointCorrupt: the file is too short.
            OSError: the device failed.
        """
        done = self._read_cached(buffer[:nbytes], offset)
        if done == nbytes:
            return "cache"
        done -= done % DATA_ALIGNMENT
        while done < nbytes:
            count = self._read_disk(buffer[done : round_up(nbytes, DATA_ALIGNMENT)], offset + done, nbytes - done)
            if count == 0:
                problem = f"it ends at byte {offset + done}, but a read must reach to {offset + nbytes}"
                raise CheckpointCorrupt(self.path, problem, "remove the checkpoint and convert again")
            done = min(done + count, nbytes)
        return "disk"

    def close(self) -> None:
        """Close the descriptors. Closing twice is harmless."""
        for fd in (self._fd, self._direct_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct_fd = -1, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open_direct(self) -> int | None:
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            self._fall_back(error)
            return None

    def _read_cached(self, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return 0
            raise

    def _read_disk(self, buffer: memoryview, offset: int, nbytes: int) -> int:
        if self._direct_fd is not None and self._reads_direct and offset % DATA_ALIGNMENT == 0:
            try:
                return os.preadv(self._direct_fd, [buffer], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._fall_back(error)  # keep the descriptor open: another thread may be reading from it
        return os.preadv(self._fd, [buffer[:nbytes]], offset)

    def _fall_back(self, error: OSError) -> None:
        with self._falling_back:
            is_first, self._reads_direct = self._reads_direct, False
        if is_first:
            logger.warning("direct_io=off path=%s reason=%r reading=buffered", self.path, error.strerror)
