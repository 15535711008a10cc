"""Opens files that a daemon keeps or is given: regular files only, and without ever blocking.

If a FIFO took such a file's place, opening it could block the process, and with it the daemon's loop, forever. Opening
a device may have any effect.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from sllm_vllm.errors import ConfigError

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


# A daemon's key, kept in a file that is created once and that only the daemon's user can read.


def open_key(path: Path) -> str:
    """The key that a client must present; created at the first call.

    Raises:
        ConfigError: other users may read the file, it holds no key, or it can't be created or read.
    """
    try:
        with contextlib.suppress(FileExistsError):
            _write_key(path)
        fd = open_plain(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(fd, encoding="ascii", errors="replace") as file:
            facts, key = os.fstat(fd), file.read(4096).strip()
    except OSError as error:
        raise ConfigError(f"{path}: the key can't be made or read ({error.strerror}); remove what is there") from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077 or not key:
        raise ConfigError(f"{path}: it must belong to this user and be readable by no one else; remove it")
    return key


def _write_key(path: Path) -> None:
    """Create the file together with its content, so that a crash leaves no empty file."""
    staging = path.with_name(f"{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(staging, path)
    finally:
        staging.unlink()
