"""The address of an engine that listens on a Unix socket, as one string: ``unix:///path/to/socket``."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

HOST = "localhost"
"""What such an engine is told as host: HTTP/1.1 wants one."""
_SCHEME = "unix://"


def url_of_socket(path: Path) -> str:
    """The URL of an absolute path."""
    return _SCHEME + quote(os.fsencode(path))


def socket_of_url(url: str) -> str | None:
    """The path; None if it is the URL of something else."""
    return os.fsdecode(unquote_to_bytes(url.removeprefix(_SCHEME))) if url.startswith(_SCHEME) else None
