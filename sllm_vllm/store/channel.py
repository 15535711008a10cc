"""The Unix socket itself: where it is, who is at its other end, and the one word that needs no more than that.

Imports nothing that costs time: the plugin uses it in every vLLM process, before anything else.
"""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

from sllm_vllm.errors import SllmError, StoreRefused, StoreUnavailable
from sllm_vllm.unix_listener import is_trusted, open_channel, peer_of, short_address

__all__ = ["MEND_UNAVAILABLE", "PROTOCOL_VERSION", "connect_to", "peer_of", "send_hint", "short_address"]

PROTOCOL_VERSION = 1
MEND_UNAVAILABLE = "start `sllm-vllm store serve`, or go on without it"


def connect_to(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the daemon's socket, whose peer is this user (or root); nothing was said yet.

    Raises:
        StoreUnavailable: nobody listens there. StoreRefused: another user does.
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
