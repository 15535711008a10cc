"""Serves a node's checkpoints to other nodes of its cluster: read-only files over HTTP, with ranges and a key of its
own.

It serves files as ``store/remote.py`` reads them from any web server, so a peer is a remote like any other, and every
chunk from it is verified. It speaks plain HTTP: use it only on a private network between nodes, like Ray's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from aiohttp import BasicAuth, web

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME
from sllm_vllm.checkpoint.repository import is_legal_name

USER = "peer"
ANSWERS_MAX = 64
"""Answers at once: four nodes that pull over eight connections each, twice over; further clients get 503 and retry."""
_KEY_NBYTES = 24
_FILE = re.compile(rf"{re.escape(MANIFEST_NAME)}|partitions/rank-\d{{5}}\.safetensors")


class PeerServer:
    """Serves the checkpoints in ``store_dir`` from ``start`` to ``close``, on a free port of ``host``."""

    def __init__(self, store_dir: Path, host: str) -> None:
        self._store_dir = store_dir
        self._host = host
        self._key = secrets.token_urlsafe(_KEY_NBYTES)
        self._num_answers = 0
        self._runner: web.AppRunner | None = None
        self.url = ""
        """Includes user and key, for ``pull_checkpoint``, which appends a checkpoint's name. Must never be logged."""

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            OSError: this machine has no such address.
        """
        app = web.Application()
        app.router.add_get("/{name}/{path:.+}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0)
        await site.start()
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{USER}:{self._key}@{host}:{port}"

    async def close(self) -> None:
        """Close the port; answers under way are ended."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not self._is_let_in(request.headers.get("Authorization", "")):
            return web.Response(status=401, headers={"WWW-Authenticate": "Basic"})
        name, path = request.match_info["name"], request.match_info["path"]
        if not is_legal_name(name) or not _FILE.fullmatch(path):
            return web.Response(status=404)
        if self._num_answers >= ANSWERS_MAX:
            return web.Response(status=503, headers={"Retry-After": "1"})
        with self._counted():
            file = self._store_dir / name / path
            if not await asyncio.to_thread(file.is_file):
                return web.Response(status=404)
            response = web.FileResponse(file)
            await response.prepare(request)  # sends the file, by sendfile where the system can
            return response

    def _is_let_in(self, told: str) -> bool:
        try:
            given = BasicAuth.decode(told, encoding="utf-8")
        except ValueError:
            return False
        is_right = hmac.compare_digest(given.password.encode(), self._key.encode())
        return is_right and given.login == USER

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_answers += 1
        try:
            yield
        finally:
            self._num_answers -= 1
