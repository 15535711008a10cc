"""What somebody who has Ray Serve would put before an engine: a deployment that streams requests through by aiohttp.

``python -P benchmarks/overhead_serve.py BACKEND PORT TMP``, by the Python of an environment that has Ray: a cluster of
its own in TMP, one HTTP proxy, one replica. Prints ``serving`` and lives until SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

ONGOING_MAX = 1024
"""By itself Serve sends five at once to a replica, and streams would wait for each other."""
NUM_CPUS = 2


class Forward:
    """Sends a request on, and its answer back as it comes."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> StreamingResponse:
        """One request."""
        if self._session is None:  # it needs a running loop
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        url = f"{self._backend}{request.url.path}"
        answer = await self._session.post(url, data=await request.body(), headers=headers)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.content.iter_any():
                    yield piece
            finally:
                answer.close()

        return StreamingResponse(pieces(), answer.status, media_type=answer.headers.get("content-type"))


def main(backend: str, port: int, tmp: str) -> None:
    """Serve until told to stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ray.init(
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        _temp_dir=tmp,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=True,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    deployment = serve.deployment(
        Forward,
        name="forward",
        num_replicas=1,
        max_ongoing_requests=ONGOING_MAX,
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
    )
    serve.run(deployment.bind(backend), route_prefix="/")
    print("serving", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
