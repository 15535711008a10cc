"""A small HTTP server with real sockets that serves a few files from memory, and misbehaves by a script."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

DRIP_NBYTES = 4096
DRIP_S = 0.01


@dataclass(frozen=True, slots=True)
class Fault:
    """How one answer is wrong. Offsets count bytes of the body."""

    status: int | None = None
    """This status with a short text instead of the file."""
    location: str | None = None
    stops_after: int | None = None
    how: Literal["stall", "reset", "close"] = "close"
    flips: int | None = None
    """The byte whose lowest bit is wrong."""
    extra: int = 0
    """The body, and its Content-Length, is longer by so much, or shorter."""
    shift: int = 0
    """Content-Range says a range that begins so much later."""
    total: int | None = None
    """Content-Range says that the file has so many bytes."""
    ignores_range: bool = False
    drips: bool = False


SOUND = Fault()


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent."""

    path: str
    range: str | None
    authorization: str | None


@dataclass(slots=True)
class FaultyServer:
    """Files by path, faults for the next requests in order, and one for all after them; no fault for a manifest."""

    files: Mapping[str, bytes]
    faults: list[Fault] = field(default_factory=list)
    forever: Fault = SOUND
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ranges(self) -> list[str | None]:
        """Range headers of the requests for partitions, in order."""
        return [request.range for request in self.requests if request.path.endswith(".safetensors")]

    def take(self, request: Request) -> Fault:
        """Note a request; says how to answer it."""
        with self._lock:
            self.requests.append(request)
            if request.path.endswith("manifest.json"):
                return SOUND
            return self.faults.pop(0) if self.faults else self.forever


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyServer

    def do_GET(self) -> None:
        request = Request(self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        fault = self.faulty.take(request)
        content = self.faulty.files.get(self.path)
        if fault.status is not None or content is None:
            self._refuse(fault.status or 404, fault.location)
            return
        start, end = 0, len(content)
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        is_partial = bounds is not None and not fault.ignores_range
        if bounds is not None and is_partial:
            start, end = int(bounds[1]), min(int(bounds[2]) + 1, len(content))
        body = bytearray(content[start:end])
        body = body[: len(body) + fault.extra] if fault.extra < 0 else body + bytes(fault.extra)
        if fault.flips is not None:
            body[fault.flips] ^= 1
        self.send_response(206 if is_partial else 200)
        self.send_header("Content-Length", str(len(body)))
        if is_partial:
            total = len(content) if fault.total is None else fault.total
            self.send_header("Content-Range", f"bytes {start + fault.shift}-{end - 1 + fault.shift}/{total}")
        self.end_headers()
        self._send(bytes(body), fault)

    def _refuse(self, status: int, location: str | None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"no!\n")

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.drips:
            for start in range(0, len(body), DRIP_NBYTES):
                self.wfile.write(body[start : start + DRIP_NBYTES])
                time.sleep(DRIP_S)
            return
        self.wfile.write(body[: fault.stops_after])
        if fault.stops_after is None:
            return
        self.close_connection = True
        if fault.how == "stall":
            self.faulty.ended.wait()
        if fault.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        """A client that goes is no news."""

    def shutdown_request(self, request: object) -> None:
        """Close at once: a shutdown first would turn a reset into an orderly end."""
        assert isinstance(request, socket.socket)
        request.close()


@contextlib.contextmanager
def faulty_server(
    files: Mapping[str, bytes], faults: Sequence[Fault] = (), *, forever: Fault = SOUND
) -> Iterator[FaultyServer]:
    """Serve until the block ends."""
    faulty = FaultyServer(files, list(faults), forever)
    handler = type("Handler", (_Handler,), {"faulty": faulty})
    server = _Server(("127.0.0.1", 0), handler)
    faulty.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        faulty.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
