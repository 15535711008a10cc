"""URLs of engines that listen on a Unix socket: ``unix:///path/to/socket``."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

HOST = "localhost"
"""The ``Host`` sent to such an engine; HTTP/1.1 requires one."""
_SCHEME = "unix://"


def url_of_socket(path: Path) -> str:
    """The URL of the socket at an absolute path."""
    return _SCHEME + quote(os.fsencode(path))


def socket_of_url(url: str) -> str | None:
    """The socket's path; None if the URL is not that of a Unix socket."""
    return os.fsdecode(unquote_to_bytes(url.removeprefix(_SCHEME))) if url.startswith(_SCHEME) else None
