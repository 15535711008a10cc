"""Unix sockets of engines: each has a path in a folder that no other user can enter, from its order until it ends.

The engine makes its socket itself. No name is used twice while an agent lives, so no engine meets another one's file;
files that a killed agent's engines left are removed by the next agent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from sllm_vllm.daemon.unix_listener import url_of_socket
from sllm_vllm.node.core.launch import Place

# A temporary directory for each engine, removed with it: vLLM leaves its sockets and rendezvous files behind. No other
# user can read it, unlike the system's temporary directory, where vLLM would put them.


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


PATH_NBYTES_MAX = 107
"""Longest path in an address of Linux, without the zero at its end."""
_NAME_NBYTES = 4
_SHORT = Path("/tmp")


class SocketReservation:
    """The path of an engine's socket. Made by `EngineSockets`."""

    port = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_closed = False

    @property
    def url(self) -> str:
        """The URL of the server there."""
        return url_of_socket(self.path)

    def place(self, slots: tuple[int, ...], api_key: str) -> Place:
        """Where an engine on these slots listens."""
        return Place(slots, None, api_key, socket=str(self.path))

    def close(self) -> None:
        """Remove the socket, if there is one; call this once the engine has ended. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


class EngineSockets:
    """The sockets of one agent's engines. Owned by the agent's loop.

    They are in the agent's own folder, or, if that makes a path too long, in a private folder of the temporary
    directory. ``XDG_RUNTIME_DIR`` is not used: it is removed when the user logs out, while an agent may run on.

    Args:
        node_dir: the agent's own folder; the next agent of the same folder clears what this one left.
    """

    def __init__(self, node_dir: Path) -> None:
        short = f"{short_name(node_dir)}-sockets"
        folders = [node_dir.absolute() / "sockets", *(parent / short for parent in _temporary())]
        self._folder = next(folder for folder in folders if _fits(folder))
        self._used: set[str] = set()

    def clear(self) -> None:
        """Remove what a killed agent's engines left; call this before the first engine and after the last one."""
        if not is_private(self._folder):
            return
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if stat.S_ISSOCK(path.lstat().st_mode):
                    path.unlink()
            self._folder.rmdir()

    def reserve(self) -> SocketReservation:
        """Reserve a path that no other engine has or had.

        Raises:
            OSError: no private folder can be made.
        """
        folder = self._made()
        while (name := secrets.token_hex(_NAME_NBYTES)) in self._used or os.path.lexists(folder / name):
            pass
        self._used.add(name)
        return SocketReservation(folder / name)

    def _made(self) -> Path:
        """Make the folder if it is missing; use another one if its name is taken or it is not private."""
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        if not is_private(self._folder):
            parent = next(parent for parent in _temporary() if _fits(parent / "sllm-12345678"))
            self._folder = Path(tempfile.mkdtemp(prefix="sllm-", dir=parent))
        return self._folder


def _temporary() -> tuple[Path, Path]:
    return Path(tempfile.gettempdir()), _SHORT


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) + 1 + 2 * _NAME_NBYTES <= PATH_NBYTES_MAX
