"""Unix sockets of the store's daemon and the node agent: a private folder, a lock, a listener.

Also the client's side: connecting, and finding out who listens. Imports nothing slow, because the plugin uses it in
every vLLM process, before anything else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from sllm_vllm.daemon.plain_file import open_plain
from sllm_vllm.errors import SllmError

# URLs of engines that listen on a Unix socket: ``unix:///path/to/socket``.


HOST = "localhost"
"""The ``Host`` sent to such an engine; HTTP/1.1 requires one."""
_SCHEME = "unix://"


def url_of_socket(path: Path) -> str:
    """The URL of the socket at an absolute path."""
    return _SCHEME + quote(os.fsencode(path))


def socket_of_url(url: str) -> str | None:
    """The socket's path; None if the URL is not that of a Unix socket."""
    return os.fsdecode(unquote_to_bytes(url.removeprefix(_SCHEME))) if url.startswith(_SCHEME) else None


_CREDENTIALS = struct.Struct("3i")

ErrorClass = Callable[[Path, str, str], SllmError]
"""Makes an error from a path, the problem and the fix."""


@dataclass(frozen=True, slots=True)
class DaemonWords:
    """The errors and messages of one daemon."""

    error: ErrorClass
    """The system refuses to create a folder or a socket, or to open the lock."""
    busy: ErrorClass
    """Another process holds the lock."""
    busy_problem: str
    directory_mend: str
    socket_mend: str


def make_private_directory(path: Path, words: DaemonWords) -> None:
    """Create a folder with its parents, and set its mode to 0700 even if it existed before."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise words.error(path, f"it can't be made ({error.strerror})", words.directory_mend) from None


@contextlib.contextmanager
def listening(path: Path, words: DaemonWords) -> Iterator[socket.socket]:
    """Listen on a socket that only this user can connect to; its file is removed when the context ends."""
    with locked(path.with_name(path.name + ".lock"), path, words), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        umask = os.umask(0o177)
        try:
            path.unlink(missing_ok=True)  # left by a killed daemon: we hold the lock, so no daemon is using it
            with short_address(path) as address:
                listener.bind(address)
        except OSError as error:
            raise words.error(path, f"it can't be made ({error.strerror})", words.socket_mend) from None
        finally:
            os.umask(umask)
        listener.listen(socket.SOMAXCONN)
        listener.setblocking(False)
        stack.callback(path.unlink, missing_ok=True)
        yield listener


@contextlib.contextmanager
def locked(lock: Path, socket_path: Path, words: DaemonWords) -> Iterator[None]:
    """Hold a lock that the system releases with this process, however it ends."""
    try:
        fd = open_plain(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise words.error(lock, f"it can't be locked ({error.strerror})", "remove what is there") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise words.busy(socket_path, words.busy_problem, "stop it first") from None
    try:
        yield
    finally:
        os.close(fd)


def open_channel(path: Path, timeout_s: float | None) -> tuple[socket.socket, int, int]:
    """Connect to a socket; returns the connection and the listener's process and user id. Sends nothing.

    Raises:
        OSError: no process listens there.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        channel.settimeout(timeout_s)
        with short_address(path) as address:
            channel.connect(address)
        pid, uid = peer_of(channel)
    except OSError:
        channel.close()
        raise
    return channel, pid, uid


def is_trusted(uid: int) -> bool:
    """Whether a peer is this user, or root."""
    return uid in (0, os.geteuid())


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address for a socket's path of any length: a socket address holds 107 bytes, and a path may be longer."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def peer_of(channel: socket.socket) -> tuple[int, int]:
    """Process and user id of the other end, as the kernel recorded them at ``connect`` or ``listen``."""
    raw = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return int(pid), int(uid)
