"""Client of a running router's admin API: JSON over HTTP, with a key that no message shows. Blocking."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from sllm_vllm.config import ADMIN_KEY_VARIABLE as KEY_VARIABLE
from sllm_vllm.config import default_node_dir, read_variable
from sllm_vllm.daemon.plain_file import read_plain
from sllm_vllm.daemon.unix_listener import is_trusted, open_channel
from sllm_vllm.errors import ConfigError, SllmError
from sllm_vllm.units import KIB, MIB

URL_VARIABLE = "SLLM_URL"
URL_DEFAULT = "http://127.0.0.1:8000"
ADMIN_KEY_NAME = "admin.key"
"""File in the node's folder with the key that a router makes for its own user."""
URL_NAME = "router.url"
"""File in the node's folder with the address of the router that runs there."""
REPLY_NBYTES_MAX = 256 * MIB
TIMEOUT_S = 60.0
_KEY_FILE_NBYTES_MAX = 64 * KIB
_URL_NBYTES_MAX = 4096
_KEY = re.compile(r"[!-~]{1,1024}")


_NO_OTHER = f"something other than a router listens there; say where the router is with --url or {URL_VARIABLE}"
_NO_ROUTER = f"start one with `sllm-vllm serve CONFIG`, or say where it is with --url or {URL_VARIABLE}"


class AdminError(SllmError):
    """The router can't be reached, or refuses. ``code`` is the router's error code; empty if it gave none."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


def find_url(given: str | None) -> tuple[str, bool]:
    """Return the router's address, and whether the user gave it.

    It is ``given``, else SLLM_URL, else that of the router recorded in the node's folder, else the default.

    Raises:
        ConfigError: ``given`` or SLLM_URL is not a valid address; or the router recorded on this machine has ended.
    """
    variable = read_variable(URL_VARIABLE) or None
    for place, url in (("--url", given), (URL_VARIABLE, variable)):
        if url is not None:
            _split(url, place)
            return url, True
    return _recorded_url(default_node_dir()) or URL_DEFAULT, False


def write_url(node_dir: Path, host: str, port: int) -> None:
    """Record where this process's router listens, for this user's commands on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    staging = node_dir / f"{URL_NAME}.{os.getpid()}"
    staging.write_text(f"http://{f'[{host}]' if ':' in host else host}:{port} {os.getpid()}\n", encoding="ascii")
    staging.replace(node_dir / URL_NAME)


def _recorded_url(node_dir: Path) -> str | None:
    """Return the recorded address, if the process that recorded it still owns the node's socket; None if none is there.

    Raises:
        ConfigError: that process is gone. Whatever listens at the address now must not be sent a key.
    """
    try:
        with (node_dir / URL_NAME).open(encoding="ascii", errors="replace") as file:
            url, _, pid = file.read(_URL_NBYTES_MAX).strip().partition(" ")
    except OSError:
        return None
    with contextlib.suppress(OSError):
        channel, owner, uid = open_channel(node_dir / "socket", TIMEOUT_S)
        channel.close()
        if str(owner) == pid and is_trusted(uid):
            return url
    raise ConfigError(f"no router is running on this machine (the last one listened at {url}); {_NO_ROUTER}")


def read_admin_key(file: Path | None, *, is_elsewhere: bool = False) -> str:
    """Return the first key of ``file``; without a file the key of SLLM_ADMIN_KEY, else of the router's own file.

    Args:
        is_elsewhere: the router may be on another machine, so its file may be missing on this one.

    Raises:
        ConfigError: there is no key, or it is not valid. The message does not show it.
    """
    if file is None and (key := (read_variable(KEY_VARIABLE) or "").strip()):
        return _checked(key, KEY_VARIABLE)
    path = file.expanduser() if file is not None else default_node_dir() / ADMIN_KEY_NAME
    try:
        lines = read_plain(path, _KEY_FILE_NBYTES_MAX).decode("ascii", "replace").splitlines()
    except OSError as error:
        if file is None and not is_elsewhere and isinstance(error, FileNotFoundError):
            raise ConfigError(
                f"no router has run here yet (there is no {path}): start one with `sllm-vllm serve CONFIG`; for one"
                f" elsewhere, give --url and --key-file, or set {URL_VARIABLE} and {KEY_VARIABLE}"
            ) from None
        fix = "" if file is not None else f"; give --key-file, or set {KEY_VARIABLE}"
        raise ConfigError(f"{path}: no admin key there ({error.strerror}){fix}") from None
    return _checked(next((line.strip() for line in lines if line.strip()), ""), str(path))


def _checked(key: str, place: str) -> str:
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{place}: a key must be 1 to 1024 printable ASCII characters without spaces")
    return key


class AdminClient:
    """Client of one router's admin API.

    Args:
        url: where the router listens, e.g. ``http://127.0.0.1:8000``.

    Raises:
        ConfigError: the URL is not valid.
    """

    def __init__(self, url: str, key: str) -> None:
        self._host, self._port, self._prefix, self._is_tls = _split(url)
        self._address = f"{self._host}:{self._port}"
        self._key = key

    def get(self, *path: str) -> Any:  # noqa: ANN401 - JSON
        """Get the resource at ``path`` below ``/sllm/v1/``; its parts may hold any character."""
        return self._ask("GET", path)

    def post(self, *path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        """Post to ``path`` below ``/sllm/v1/``, optionally with a JSON body."""
        return self._ask("POST", path, body)

    def delete(self, *path: str) -> Any:  # noqa: ANN401 - JSON
        """Delete the resource at ``path`` below ``/sllm/v1/``."""
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: tuple[str, ...], body: object = None) -> Any:  # noqa: ANN401 - JSON
        target = "/".join([f"{self._prefix}/sllm/v1", *(quote(part, safe="") for part in path)])
        status, data = self._exchange(method, target, b"" if body is None else json.dumps(body).encode())
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            raise AdminError(f"{self._address}: status {status}, not JSON: {_NO_OTHER}") from None
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
            raise AdminError(f"{self._address}: no router answers ({problem}); {_NO_ROUTER}") from None
        finally:
            connection.close()
        if len(data) > REPLY_NBYTES_MAX:
            raise AdminError(f"{self._address}: the answer is larger than {REPLY_NBYTES_MAX} bytes")
        return answer.status, data

    def _refusal(self, status: int, reply: object) -> AdminError:
        error = reply.get("error") if isinstance(reply, dict) else None
        if not isinstance(error, dict):
            return AdminError(f"{self._address}: status {status}: {_NO_OTHER}")
        message, code = str(error.get("message")), str(error.get("code") or "")
        if status in {401, 403}:
            message += f" Give the right one with --key-file or {KEY_VARIABLE}."
        return AdminError(f"{self._address}: {message}", code=code)


def _split(url: str, place: str = "--url") -> tuple[str, int, str, bool]:
    """Return a URL's host, port, path prefix, and whether it uses TLS."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not is_plain:
        raise ConfigError(f"{place}: must be a URL like http://127.0.0.1:8000, without a user or a query")
    is_tls = parts.scheme == "https"
    return parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls
