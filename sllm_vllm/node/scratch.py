"""A temporary directory for each engine, gone with it: vLLM leaves its sockets and rendezvous files behind.

Only this user can look into it, unlike the system's, where vLLM would put them.
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
        """Remove what a killed agent left; before the first engine."""
        if is_private(self._root):
            shutil.rmtree(self._root, ignore_errors=True)

    def make(self) -> Path:
        """A new directory.

        Raises:
            OSError: there is no room, or somebody else has the name.
        """
        with contextlib.suppress(FileExistsError):
            self._root.mkdir(mode=0o700)
        if not is_private(self._root):
            return Path(tempfile.mkdtemp(prefix="sllm-"))
        return Path(tempfile.mkdtemp(dir=self._root, prefix=""))

    def remove(self, directory: Path) -> None:
        """Remove one, and the root with the last."""
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._root.rmdir()


def short_name(node_dir: Path) -> str:
    """The name of a directory in the system's temporary one, for the agent of this folder and user."""
    digest = hashlib.blake2b(os.fsencode(node_dir.absolute()), digest_size=4).hexdigest()
    return f"sllm-{os.geteuid()}-{digest}"


def is_private(path: Path) -> bool:
    """Whether it is a directory of this user that no other user can enter, not a link."""
    try:
        facts = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
