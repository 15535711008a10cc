"""The pool: one shared file of equal slots that clients can only read, in huge pages where the system allows it.

The file is made in one of two ways, tried in this order:

1. A tmpfs with ``huge=always``, mounted in a private mount namespace (and a user namespace if not root). Clients get a
   descriptor opened through a read-only mount: reopening it for writing fails with EROFS.
2. A memfd, sealed after the daemon mapped it, so that no other writable mapping of it can be made. The system's
   ``shmem_enabled`` setting determines its page size, usually 4 KiB.

Either way the memory exists as long as any process maps it, so engines keep running when the daemon ends.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

HUGE_PAGE_NBYTES = 2 << 20
_F_SEAL_FUTURE_WRITE = 0x0010  # not in Python's fcntl before 3.14
_MADV_POPULATE_WRITE = 23
_HELPER_TIMEOUT_S = 30.0
_libc = ctypes.CDLL(None)  # calls through ctypes release the GIL, unlike mmap.madvise


class Pool:
    """``num_slots`` slots of ``slot_nbytes`` each. The daemon writes through ``slot_view``; clients map ``client_fd``.

    Raises:
        OSError: the system can't provide the memory.
    """

    def __init__(self, num_slots: int, slot_nbytes: int, mount_point: Path) -> None:
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        nbytes = num_slots * slot_nbytes
        huge = _huge_file(nbytes, mount_point) if slot_nbytes % HUGE_PAGE_NBYTES == 0 else None
        self.page_nbytes = HUGE_PAGE_NBYTES if huge else mmap.PAGESIZE
        if huge:
            writable_fd, self.client_fd = huge
        else:
            writable_fd = os.memfd_create("sllm-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(writable_fd, nbytes)
        self._mapping = mmap.mmap(writable_fd, nbytes, flags=mmap.MAP_SHARED)
        self._view = memoryview(self._mapping)
        if huge:
            os.close(writable_fd)
        else:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(writable_fd, fcntl.F_ADD_SEALS, seals)
            self.client_fd = os.open(f"/proc/self/fd/{writable_fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(writable_fd)

    def slot_view(self, slot: int) -> memoryview:
        """Return a slot's memory, writable and page-aligned."""
        return self._view[slot * self.slot_nbytes : (slot + 1) * self.slot_nbytes]

    def prefault(self, slot: int) -> None:
        """Allocate a slot's pages now; its content does not change. Has no effect on kernels before 5.14."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping, slot * self.slot_nbytes))
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(self.slot_nbytes), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap the pool and close its descriptor. Clients keep their own mappings."""
        self._view.release()
        with contextlib.suppress(BufferError):  # a reader thread still holds a slot's view; the process ends anyway
            self._mapping.close()
        if self.client_fd >= 0:
            os.close(self.client_fd)
        self.client_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _huge_file(nbytes: int, mount_point: Path) -> tuple[int, int] | None:
    """Make a tmpfs file in huge pages. Returns a writable and a read-only descriptor; None if the system forbids it.

    A child process does this, because only a single-threaded process can enter a new user namespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-m", "sllm_vllm.store.huge_file", str(theirs.fileno()), str(nbytes)]
        command.append(str(mount_point))
        try:
            done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=_HELPER_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(2 * array.array("i").itemsize))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    for fd in fds:
        os.set_inheritable(fd, False)
    return (fds[0], fds[1]) if len(fds) == 2 else None
