"""A request to an engine itself, on a port or on a Unix socket."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from sllm_vllm.daemon.unix_listener import socket_of_url


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_engine(
    url: str, path: str, data: bytes | None = None, headers: Mapping[str, str] | None = None, *, timeout_s: float
) -> tuple[int, str, bytes]:
    """Status, content type and body. A POST if there are ``data``."""
    at = socket_of_url(url)
    connection = (
        http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
        if at is None
        else _SocketConnection(at, timeout_s)
    )
    try:
        connection.request("GET" if data is None else "POST", path, data, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.headers.get("content-type", ""), answer.read()
    finally:
        connection.close()
