"""A range of addresses whose owner chooses for each part whether it is private memory, a file's pages or inaccessible.

Calls libc, because the standard library's ``mmap`` can't place a mapping at a given address. Not pure; needs Linux and
numpy.
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

    The memory lives as long as this object or any array over it. Offsets and lengths must be multiples of the page
    size, except in ``array``. Methods may be called from any thread and from finalisers: none takes a lock or allocates
    much.

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
        """A part as an array of bytes, which keeps the whole alive. It is marked writable even if the memory isn't."""
        assert 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        return numpy.asarray(_Window(self, offset, nbytes))

    def map_file(self, offset: int, nbytes: int, *, fd: int, file_offset: int, shared: bool = False) -> None:
        """Replace a part by a file's pages, which are copied on write, or read-only if ``shared``.

        Raises:
            OSError: the system refuses (too many mappings); the part is unchanged.
        """
        self._check(offset, nbytes)
        protection, kind = (mmap.PROT_READ, mmap.MAP_SHARED) if shared else (_READ_WRITE, mmap.MAP_PRIVATE)
        _mmap(self.address + offset, nbytes, protection, flags=kind | _MAP_FIXED, fd=fd, file_offset=file_offset)

    def put_nothing(self, offset: int, nbytes: int) -> None:
        """Free a part's memory. Its addresses stay reserved; a process that accesses them gets SIGSEGV.

        Raises:
            OSError: the system refuses.
        """
        self._check(offset, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self.address + offset, nbytes, 0, flags=flags)

    def put_memory(self, offset: int, nbytes: int) -> None:
        """Replace a part by private memory filled with zeros.

        Raises:
            OSError: the system refuses.
        """
        self._check(offset, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self.address + offset, nbytes, _READ_WRITE, flags=flags)

    def discard(self, offset: int, nbytes: int) -> None:
        """Return a part's private pages to the system; their content is lost."""
        self._check(offset, nbytes)
        _libc.madvise(self.address + offset, nbytes, mmap.MADV_DONTNEED)

    def populate(self, offset: int, nbytes: int) -> None:
        """Map a part's pages before they are read. Where the system can't (Linux before 5.14), first use maps them."""
        self._check(offset, nbytes)
        _libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_READ)

    def _check(self, offset: int, nbytes: int) -> None:
        assert 0 <= offset < offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        assert offset % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0, (offset, nbytes)


class _Window:
    """What numpy makes an array from. It is the array's base, so that the address space lives as long as the array."""

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
