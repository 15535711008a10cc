"""Opens files that a daemon keeps or is given: regular files only, and without ever blocking.

If a FIFO took such a file's place, opening it could block the process, and with it the daemon's loop, forever. Opening
a device may have any effect.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_ALWAYS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
NOT_REGULAR = "it is not a regular file"


def open_plain(path: Path | str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file and return its descriptor, which children don't inherit. Also an ``opener`` for ``open``.

    Raises:
        OSError: as ``os.open`` does; ``EISDIR`` or ``EINVAL`` if it is not a regular file.
    """
    try:
        found = os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW).st_mode
    except FileNotFoundError:
        found = stat.S_IFREG  # the flags may say to create it
    if not stat.S_ISLNK(found):  # a link (with O_NOFOLLOW) is left to os.open, whose error is clearer
        require_regular(path, found)
    fd = os.open(path, flags | _ALWAYS, mode)
    try:
        require_regular(path, os.fstat(fd).st_mode)  # the file may have been replaced since the check above
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_plain(path: Path | str, nbytes_max: int) -> bytes:
    """Read the whole of a regular file.

    Raises:
        OSError: as ``open_plain`` does; ``EFBIG`` if the file is larger than ``nbytes_max``.
    """
    with open(open_plain(path, os.O_RDONLY), "rb") as file:
        data = file.read(nbytes_max + 1)
    if len(data) > nbytes_max:
        raise OSError(errno.EFBIG, f"it is larger than {nbytes_max} bytes", str(path))
    return data


def require_regular(path: Path | str, mode: int) -> None:
    """Raise unless ``mode``, as ``stat`` gives it, is that of a regular file.

    Raises:
        OSError: ``EISDIR`` for a directory, ``EINVAL`` for anything else.
    """
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
