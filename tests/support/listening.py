"""Where a process's session listens, read from ``/proc``."""

from __future__ import annotations

import os
import re
import socket
import struct
from pathlib import Path

from sllm_vllm.node.engine_process import living_members

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_LISTEN = "0A"
_ACCEPTS = "00010000"
"""Flag of a Unix socket that listens."""


def listening_addresses(session: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that a process of this session listens on."""
    held = {inode for pid in living_members(session) for inode in _sockets_of(pid)}
    return {where for inode, where in _listeners() if inode in held}


def own_addresses(pid: int) -> set[tuple[str, int]]:
    """The same of one process alone: of an engine's first one, its API."""
    return {where for inode, where in _listeners() if inode in _sockets_of(pid)}


def servers_of(session: int, path: str) -> set[int]:
    """The processes of this session that hold the socket which listens at this path."""
    words = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    inodes = {word[6] for word in words if word[7:] == [path] and word[3] == _ACCEPTS}
    return {pid for pid in living_members(session) if inodes & _sockets_of(pid)}


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = _SOCKET.fullmatch(os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
        if match:
            found.add(match[1])
    return found


def _listeners() -> list[tuple[str, tuple[str, int]]]:
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                found.append((fields[9], _address(fields[1])))
    return found


def _address(text: str) -> tuple[str, int]:
    host, port = text.split(":")
    words = [struct.pack("=I", int(host[at : at + 8], 16)) for at in range(0, len(host), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words)), int(port, 16)
