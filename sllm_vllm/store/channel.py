"""Connects to the daemon's Unix socket, checks the peer's user, and sends hints.

Imports only cheap modules, because the plugin uses it in every vLLM process before anything else.
"""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

from sllm_vllm.daemon.unix_listener import is_trusted, open_channel, peer_of, short_address
from sllm_vllm.errors import SllmError, StoreRefused, StoreUnavailable

__all__ = ["MEND_UNAVAILABLE", "PROTOCOL_VERSION", "connect_to", "peer_of", "send_hint", "short_address"]

PROTOCOL_VERSION = 1
MEND_UNAVAILABLE = "start `sllm-vllm store serve`, or go on without it"


def connect_to(path: Path, timeout_s: float) -> socket.socket:
    """Connect to the daemon's socket and check that its owner is this user or root. Sends nothing.

    Raises:
        StoreUnavailable: no daemon listens there. StoreRefused: the socket belongs to another user.
    """
    try:
        channel, _, owner = open_channel(path, timeout_s)
    except OSError as error:
        said = error.strerror or str(error)
        raise StoreUnavailable(path, f"no daemon of the store: {said}", MEND_UNAVAILABLE) from None
    if not is_trusted(owner):
        channel.close()
        raise StoreRefused(path, f"it belongs to user {owner}", "give a socket of your own")
    return channel


def send_hint(path: Path, model: str, tensor_parallel_size: int | None) -> bool:
    """Tell the daemon, if one is running, which model a starting vLLM process will load.

    Returns whether the hint was sent. Never raises and never waits long. Encodes the messages without pydantic, whose
    import would slow down the start too much.
    """
    hello = {"kind": "hello", "version": PROTOCOL_VERSION}
    hint = {"kind": "hint", "model": model, "tensor_parallel_size": tensor_parallel_size}
    try:
        with connect_to(path, 0.5) as channel:
            for body in (json.dumps(hello).encode(), json.dumps(hint).encode()):
                channel.sendall(struct.pack(">I", len(body)) + body)
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(1 << 16):  # wait until the daemon hangs up: closing earlier could lose the hint
                pass
    except (OSError, SllmError):
        return False
    return True
