"""The child process of ``pool.py``: mounts a tmpfs with huge pages that no other process sees.

``python -m sllm_vllm.store.huge_file SOCKET_FD NBYTES MOUNT_POINT`` sends a writable and a read-only descriptor of a
file of NBYTES over the socket. Exits with 1 if the system does not allow it. Nothing stays mounted: the namespace ends
with this process, and the file with its last descriptor or mapping.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20, 0x1000, 0x4000, 1 << 18
_LOCKED_DOWN = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


def main(socket_fd: int, nbytes: int, mount_point: Path) -> int:
    """Make the file and send its descriptors. Returns the exit status."""
    try:
        _enter_namespace()
        _mount(None, Path("/"), _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", mount_point, _LOCKED_DOWN, options=f"huge=always,size={nbytes},mode=0700")
        view = mount_point / "view"
        view.mkdir()
        writable = os.open(mount_point / "pool", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        os.ftruncate(writable, nbytes)
        _mount(str(mount_point), view, _MS_BIND)
        _mount(None, view, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _LOCKED_DOWN)
        readable = os.open(view / "pool", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 1
    with socket.socket(fileno=socket_fd) as channel:
        socket.send_fds(channel, [b"\0"], [writable, readable])
    return 0


def _enter_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWNS) == 0:
        return
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        _raise_errno()
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _mount(source: str | None, target: Path, flags: int, *, options: str = "") -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    told = source.encode() if source is not None else None
    if _libc.mount(told, bytes(target), kind, ctypes.c_ulong(flags), options.encode()) != 0:
        _raise_errno()


def _raise_errno() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
