"""What a Ray Serve user would put in front of an engine: a deployment that streams requests through with aiohttp.

Run it as ``python -P benchmarks/router/overhead_serve.py BACKEND PORT TMP``, with the Python of an environment that has
Ray. It starts its own cluster in TMP, with one HTTP proxy and one replica, prints ``serving`` and runs until SIGTERM.
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
"""By default Serve sends a replica five requests at once, and streams would wait for each other."""
NUM_CPUS = 2


class Forward:
    """Forwards a request, and streams its answer back."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> StreamingResponse:
        """Handle one request."""
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
    """Serve until SIGTERM or SIGINT."""
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
