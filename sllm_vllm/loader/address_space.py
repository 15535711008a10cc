"""A range of addresses whose parts are private memory, a file's pages or nothing, as whoever owns it decides.

``mmap`` of the standard library can't place a mapping at an address. Not pure; needs Linux and numpy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy
import numpy.typing

from sllm_vllm.units import round_up

ByteArray = numpy.typing.NDArray[numpy.uint8]

HUGE_PAGE_NBYTES = 2 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_READ = 22  # Linux 5.14
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class AddressSpace:
    """``nbytes`` of private anonymous memory, aligned to 2 MiB, in huge pages where the system has them.

    Lives as long as this object or an array over it. Offsets and lengths are multiples of the page size, but for
    ``array``. Any thread may call anything, also a finaliser: no method takes a lock or allocates much.

    Raises:
        OSError: no addresses are left.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, 1), mmap.PAGESIZE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = _mmap(None, self.nbytes + HUGE_PAGE_NBYTES, _READ_WRITE, flags=flags)
        self.address = round_up(start, HUGE_PAGE_NBYTES)
        head = self.address - start
        if head:
            _libc.munmap(start, head)
        if head < HUGE_PAGE_NBYTES:
            _libc.munmap(self.address + self.nbytes, HUGE_PAGE_NBYTES - head)
        if self.nbytes >= HUGE_PAGE_NBYTES:
            _libc.madvise(self.address, self.nbytes, mmap.MADV_HUGEPAGE)
        weakref.finalize(self, _libc.munmap, self.address, self.nbytes).atexit = False

    def array(self, offset: int, nbytes: int) -> ByteArray:
        """A part as bytes. Keeps the whole alive. Says that it can be written, whether or not."""
        assert 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        return numpy.asarray(_Window(self, offset, nbytes))

    def map_file(self, offset: int, nbytes: int, *, fd: int, file_offset: int, shared: bool = False) -> None:
        """Put a file's pages in place of a part: copied at the first write, or with ``shared`` read-only.

        Raises:
            OSError: the system refuses (too many mappings); the part is as it was.
        """
        self._check(offset, nbytes)
        protection, kind = (mmap.PROT_READ, mmap.MAP_SHARED) if shared else (_READ_WRITE, mmap.MAP_PRIVATE)
        _mmap(self.address + offset, nbytes, protection, flags=kind | _MAP_FIXED, fd=fd, file_offset=file_offset)

    def put_nothing(self, offset: int, nbytes: int) -> None:
        """Take a part's memory away; the addresses stay ours, and whoever uses them dies.

        Raises:
            OSError: the system refuses.
        """
        self._check(offset, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self.address + offset, nbytes, 0, flags=flags)

    def put_memory(self, offset: int, nbytes: int) -> None:
        """Put private, empty memory in place of a part.

        Raises:
            OSError: the system refuses.
        """
        self._check(offset, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self.address + offset, nbytes, _READ_WRITE, flags=flags)

    def discard(self, offset: int, nbytes: int) -> None:
        """Give a part's private pages back to the system; what it holds is lost."""
        self._check(offset, nbytes)
        _libc.madvise(self.address + offset, nbytes, mmap.MADV_DONTNEED)

    def populate(self, offset: int, nbytes: int) -> None:
        """Have a part's pages in place before they are read. Where the system can't, they come at first use."""
        self._check(offset, nbytes)
        _libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_READ)

    def _check(self, offset: int, nbytes: int) -> None:
        assert 0 <= offset < offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        assert offset % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0, (offset, nbytes)


class _Window:
    """What numpy makes an array of; the array's base, so that the space lives as long."""

    def __init__(self, space: AddressSpace, offset: int, nbytes: int) -> None:
        self._space = space
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (space.address + offset, False),
        }


def _mmap(address: int | None, nbytes: int, protection: int, *, flags: int, fd: int = -1, file_offset: int = 0) -> int:
    result: int | None = _libc.mmap(address, nbytes, protection, flags, fd, file_offset)
    if result is None or result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
