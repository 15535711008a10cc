"""Asks a running router as an operator does: JSON over HTTP, with a key that no message shows. Blocks."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from sllm_vllm.config import default_node_dir, read_variable
from sllm_vllm.errors import ConfigError, SllmError
from sllm_vllm.units import KIB, MIB

KEY_VARIABLE = "SLLM_ADMIN_KEY"
ADMIN_KEY_NAME = "admin.key"
"""In the node's folder: the key that a router makes for its own user."""
REPLY_NBYTES_MAX = 256 * MIB
TIMEOUT_S = 60.0
_KEY_FILE_NBYTES_MAX = 64 * KIB
_KEY = re.compile(r"[!-~]{1,1024}")


class AdminError(SllmError):
    """The router can't be reached, or refuses. ``code`` is the router's word for why; empty if it said nothing."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


def read_admin_key(file: Path | None) -> str:
    """The first key of ``file``; without one that of SLLM_ADMIN_KEY, or of the router's own file.

    Raises:
        ConfigError: there is none, or it is none. The message does not show it.
    """
    if file is None and (key := (read_variable(KEY_VARIABLE) or "").strip()):
        return _checked(key, KEY_VARIABLE)
    path = file.expanduser() if file is not None else default_node_dir() / ADMIN_KEY_NAME
    try:
        with path.open("rb") as opened:
            lines = opened.read(_KEY_FILE_NBYTES_MAX).decode("ascii", "replace").splitlines()
    except OSError as error:
        mend = "" if file is not None else f"; give --key-file, or set {KEY_VARIABLE}"
        raise ConfigError(f"{path}: no admin key there ({error.strerror}){mend}") from None
    return _checked(next((line.strip() for line in lines if line.strip()), ""), str(path))


def _checked(key: str, place: str) -> str:
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{place}: a key has to be 1 to 1024 ASCII characters, no space among them")
    return key


class AdminClient:
    """One router's orders.

    Args:
        url: where it listens, as ``http://127.0.0.1:8000``.

    Raises:
        ConfigError: the URL is none of those.
    """

    def __init__(self, url: str, key: str) -> None:
        self._host, self._port, self._prefix, self._is_tls = _split(url)
        self._shown = f"{self._host}:{self._port}"
        self._key = key

    def get(self, *path: str) -> Any:  # noqa: ANN401 - JSON
        """What stands below ``/sllm/v1/``; parts of the path may hold anything."""
        return self._ask("GET", path)

    def post(self, *path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        """Order something."""
        return self._ask("POST", path, body)

    def delete(self, *path: str) -> Any:  # noqa: ANN401 - JSON
        """Remove something."""
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: tuple[str, ...], body: object = None) -> Any:  # noqa: ANN401 - JSON
        target = "/".join([f"{self._prefix}/sllm/v1", *(quote(part, safe="") for part in path)])
        status, data = self._exchange(method, target, b"" if body is None else json.dumps(body).encode())
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            raise AdminError(f"{self._shown}: status {status}, and no JSON; is a router there?") from None
        if status >= 300:
            raise self._refusal(status, reply)
        return reply

    def _exchange(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request(method, target, body, headers)
            with connection.getresponse() as answer:
                data = answer.read(REPLY_NBYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise AdminError(f"{self._shown}: no router answers ({problem}); is `sllm-vllm serve` running?") from None
        finally:
            connection.close()
        if len(data) > REPLY_NBYTES_MAX:
            raise AdminError(f"{self._shown}: the answer is larger than {REPLY_NBYTES_MAX} bytes")
        return answer.status, data

    def _refusal(self, status: int, reply: object) -> AdminError:
        error = reply.get("error") if isinstance(reply, dict) else None
        if not isinstance(error, dict):
            return AdminError(f"{self._shown}: status {status}; is a router there?")
        message, code = str(error.get("message")), str(error.get("code") or "")
        if status in {401, 403}:
            message += f" Give the right one with --key-file or {KEY_VARIABLE}."
        return AdminError(f"{self._shown}: {message}", code=code)


def _split(url: str) -> tuple[str, int, str, bool]:
    """Host, port, beginning of every path, and whether it is TLS."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not is_plain:
        raise ConfigError("--url: it has to be like http://127.0.0.1:8000, without a user or a query")
    is_tls = parts.scheme == "https"
    return parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls
