"""Stands in for the daemon: a thread with a real Unix socket and canned answers, and a status as the real one gives."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from sllm_vllm.config import REQUEST_NBYTES_MAX
from sllm_vllm.store.channel import PROTOCOL_VERSION, short_address
from sllm_vllm.store.protocol import (
    Answer,
    FrameReader,
    Hello,
    Order,
    Request,
    StoreReply,
    StoreWelcome,
    decode_request,
    encode,
)
from sllm_vllm.units import GIB, KIB, MIB

HOP = {"nbytes": 3 * GIB, "seconds": 1.5, "bps": 2e9, "limit_bps": None}
JOBS = {"queued": 0, "running": 1}
STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 4242,
    "uptime_s": 7300.0,
    "socket": "/run/user/1000/store/socket",
    "policy": "cost",
    "pool": {
        "slots": 64,
        "slot_nbytes": 16 * MIB,
        "page_nbytes": 2 * MIB,
        "free": 1,
        "filling": 0,
        "ready": 63,
        "kept": 3,
        "pinned": 0,
    },
    "tiers": {
        "HOST": {"nbytes": GIB, "capacity_nbytes": 2 * GIB, "checkpoints": 3},
        "DISK": {"nbytes": GIB, "capacity_nbytes": None, "checkpoints": 4},
        "REMOTE": {"urls": ["s3://bucket/x"]},
    },
    "checkpoints": [
        {
            "name": f"org--a-model-with-a-long-name-{'x' * 60}-{number:020d}",
            "rank": number,
            "nbytes": 140 * GIB + number,
            "resident_nbytes": 100 * GIB,
            "tiers": ["HOST", "DISK", "REMOTE"],
            "pinned": number == 0,
            "uses": 12345,
            "last_used_s": 12.5 if number else None,
        }
        for number in range(2)
    ]
    + [
        {
            "name": "on-disk-alone",
            "rank": None,
            "nbytes": 0,
            "resident_nbytes": 0,
            "tiers": ["DISK"],
            "pinned": False,
            "uses": 0,
            "last_used_s": None,
        }
    ],
    "leases": [
        {
            "token": 123456,
            "name": f"org--a-model-with-a-long-name-{'x' * 60}-{0:020d}",
            "rank": 0,
            "pid": 4194304,
            "hold": True,
            "wanted": 10000,
            "given": 10000,
            "kept": 10000,
            "age_s": 3.5,
        }
    ],
    "hits": 1,
    "misses": 2,
    "hit_rate": 1 / 3,
    "evictions": 0,
    "reads_failed": 0,
    "clients": 2,
    "nbytes_in_flight": 0,
    "hops": {"disk": HOP, "remote": {**HOP, "bps": None}, "write": {**HOP, "limit_bps": 3e9}},
    "jobs": {"load": JOBS, "fill": JOBS, "write": JOBS},
}
EMPTY = {**STATUS, "checkpoints": [], "leases": [], "hits": 0, "misses": 0, "hit_rate": None}


class ScriptedDaemon:
    """Welcomes, notes every order and answers it with `answer`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.orders: list[Order] = []
        self.answer: Answer = StoreReply()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_address(path) as address:
            self._socket.bind(address)
        self._socket.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                channel, _ = self._socket.accept()
                with channel:
                    self._converse(channel)

    def _converse(self, channel: socket.socket) -> None:
        frames = FrameReader(REQUEST_NBYTES_MAX)
        while data := channel.recv(1 << 16):
            for body in frames.feed(data):
                self._hear(channel, decode_request(body))

    def _hear(self, channel: socket.socket, request: Request) -> None:
        if isinstance(request, Hello):
            welcome = StoreWelcome(version=PROTOCOL_VERSION, slot_nbytes=MIB, num_slots=1, page_nbytes=4 * KIB)
            memory = os.memfd_create("pool")
            socket.send_fds(channel, [encode(welcome)], [memory])
            os.close(memory)
        elif isinstance(request, Order):
            self.orders.append(request)
            channel.sendall(encode(self.answer))
