"""Files that a daemon keeps or is given: only regular ones are opened, and opening one never waits.

A FIFO in the place of a file blocks the process that opens it, perhaps for good and with the daemon's loop; a device
may do anything when it is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_ALWAYS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
NOT_REGULAR = "it is no regular file"


def open_plain(path: Path | str, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a regular file, not inherited by children; also an ``opener`` for ``open``.

    Raises:
        OSError: as ``os.open`` does; ``EINVAL`` if something else is there.
    """
    try:
        found = os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW).st_mode
    except FileNotFoundError:
        found = stat.S_IFREG  # it may be made now
    if not stat.S_ISLNK(found):  # with O_NOFOLLOW; the system's own error says it better
        require_regular(path, found)
    fd = os.open(path, flags | _ALWAYS, mode)
    try:
        require_regular(path, os.fstat(fd).st_mode)  # another may have taken the place since
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_plain(path: Path | str, nbytes_max: int) -> bytes:
    """All of a regular file.

    Raises:
        OSError: as ``open_plain``; ``EFBIG`` if it is larger than ``nbytes_max``.
    """
    with open(open_plain(path, os.O_RDONLY), "rb") as file:
        data = file.read(nbytes_max + 1)
    if len(data) > nbytes_max:
        raise OSError(errno.EFBIG, f"it is larger than {nbytes_max} bytes", str(path))
    return data


def require_regular(path: Path | str, mode: int) -> None:
    """Refuse what is not a regular file; ``mode`` as ``stat`` gives it.

    Raises:
        OSError: ``EISDIR`` for a directory, else ``EINVAL``.
    """
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
