"""The pool: one shared file of equal slots, in huge pages where the system lets us, which clients can only read.

Two ways to have such a file, tried in this order:

1. a tmpfs of our own with ``huge=always``, mounted in a private mount namespace (and user namespace, without root), of
   which clients get a descriptor opened through a read-only mount: opening it anew for writing fails with EROFS;
2. a memfd, sealed after it was mapped here: no other writable mapping can ever be made of it. Its pages are as large as
   the system's ``shmem_enabled`` says, mostly 4 KiB.

Either way the memory lives on for as long as anybody maps it: an engine outlives the daemon.
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
_libc = ctypes.CDLL(None)  # unlike mmap.madvise, it lets other threads run meanwhile


class Pool:
    """``num_slots`` slots of ``slot_nbytes`` each. The daemon writes through ``slot_view``, clients map ``client_fd``.

    Raises:
        OSError: the system has no memory for it.
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
        """A slot's memory, writable, page-aligned."""
        return self._view[slot * self.slot_nbytes : (slot + 1) * self.slot_nbytes]

    def prefault(self, slot: int) -> None:
        """Have the system provide a slot's pages now; what it holds stays. A kernel before 5.14 does nothing."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping, slot * self.slot_nbytes))
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(self.slot_nbytes), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap; clients keep what they have mapped."""
        self._view.release()
        with contextlib.suppress(BufferError):  # a reader thread still holds a slot's view: the process ends anyway
            self._mapping.close()
        if self.client_fd >= 0:
            os.close(self.client_fd)
        self.client_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _huge_file(nbytes: int, mount_point: Path) -> tuple[int, int] | None:
    """A tmpfs file in huge pages, as a writable and a read-only descriptor; None where the system does not let us.

    A child process does it, since a namespace is entered by a process of one thread.
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
