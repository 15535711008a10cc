"""The Unix socket itself: where it is, who is at its other end, and the one word that needs no more than that.

Imports nothing that costs time: the plugin uses it in every vLLM process, before anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from sllm_vllm.errors import SllmError, StoreRefused, StoreUnavailable

PROTOCOL_VERSION = 1
MEND_UNAVAILABLE = "start `sllm-vllm store serve`, or go on without it"
_CREDENTIALS = struct.Struct("3i")


def connect_to(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the daemon's socket, whose peer is this user (or root); nothing was said yet.

    Raises:
        StoreUnavailable: nobody listens there. StoreRefused: another user does.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        channel.settimeout(timeout_s)
        with short_address(path) as address:
            channel.connect(address)
        _, owner = peer_of(channel)
    except OSError as error:
        channel.close()
        said = error.strerror or str(error)
        raise StoreUnavailable(path, f"no daemon of the store: {said}", MEND_UNAVAILABLE) from None
    if owner not in (0, os.geteuid()):
        channel.close()
        raise StoreRefused(path, f"it belongs to user {owner}", "give a socket of your own")
    return channel


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address for a socket's path however long it is: an address holds 107 bytes, a path may have more."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def peer_of(channel: socket.socket) -> tuple[int, int]:
    """Process and user id at the other end, as the kernel noted them at connect."""
    raw = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return int(pid), int(uid)


def send_hint(path: Path, model: str, tensor_parallel_size: int | None) -> bool:
    """Tell a daemon, if there is one, which model a starting vLLM process will want. Never fails; never waits long.

    Speaks the protocol without pydantic, whose import would cost the start more than this may.
    """
    hello = {"kind": "hello", "version": PROTOCOL_VERSION}
    hint = {"kind": "hint", "model": model, "tensor_parallel_size": tensor_parallel_size}
    try:
        with connect_to(path, 0.5) as channel:
            for body in (json.dumps(hello).encode(), json.dumps(hint).encode()):
                channel.sendall(struct.pack(">I", len(body)) + body)
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(1 << 16):  # until the daemon has read it and hangs up: closing before would drop it
                pass
    except (OSError, SllmError):
        return False
    return True
