"""A temporary directory for each engine, removed with it: vLLM leaves its sockets and rendezvous files behind.

No other user can read it, unlike the system's temporary directory, where vLLM would put them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path


class Scratch:
    """The directories of one agent's engines. Their paths are short: a socket's address holds 107 bytes.

    Args:
        node_dir: the agent's own folder; the next agent of the same folder clears what this one left.
    """

    def __init__(self, node_dir: Path) -> None:
        self._root = Path(tempfile.gettempdir()) / short_name(node_dir)

    def clear(self) -> None:
        """Remove what a killed agent left; call this before the first engine."""
        if is_private(self._root):
            shutil.rmtree(self._root, ignore_errors=True)

    def make(self) -> Path:
        """Make a new directory.

        Raises:
            OSError: there is no room, or another user has the name.
        """
        with contextlib.suppress(FileExistsError):
            self._root.mkdir(mode=0o700)
        if not is_private(self._root):
            return Path(tempfile.mkdtemp(prefix="sllm-"))
        return Path(tempfile.mkdtemp(dir=self._root, prefix=""))

    def remove(self, directory: Path) -> None:
        """Remove a directory, and with the last one the root."""
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._root.rmdir()


def short_name(node_dir: Path) -> str:
    """The name of this agent's directory in the system's temporary one, unique for the folder and the user."""
    digest = hashlib.blake2b(os.fsencode(node_dir.absolute()), digest_size=4).hexdigest()
    return f"sllm-{os.geteuid()}-{digest}"


def is_private(path: Path) -> bool:
    """Whether it is a directory (not a link) of this user that no other user can enter."""
    try:
        facts = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
