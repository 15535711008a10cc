"""A daemon's key, kept in a file that is created once and that only the daemon's user can read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from sllm_vllm.daemon.plain_file import open_plain
from sllm_vllm.errors import ConfigError


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
