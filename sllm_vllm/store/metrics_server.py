"""The daemon's ``/metrics`` endpoint: its status in Prometheus format, over HTTP on loopback, for clients with a key.

Keeps no counts of its own: every scrape gets the status dict that ``store status`` prints. Scrapes need a key, stored
in the daemon's private folder, because every local user can connect to the port.
"""

from __future__ import annotations

import hmac
import io
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sllm_vllm.daemon.plain_file import open_key
from sllm_vllm.daemon.run_loops import is_shortage
from sllm_vllm.errors import SllmError
from sllm_vllm.metrics import SERIES_MAX, StoreMetric

logger = logging.getLogger(__name__)

KEY_NAME = "metrics.key"
HEAD_NBYTES_MAX = 8 << 10
"""Largest request line and headers."""
REQUEST_S_MAX = 5.0
"""Timeout for receiving a request, and for sending its answer."""
SCRAPES_MAX = 8
"""Most concurrent requests; further connections are closed."""

_STOP_POLL_S = 0.1
_PAUSE_S = 0.1
"""Pause after an error before connections are accepted again."""

Status = Callable[[], dict[str, Any]]
_Request = socket.socket | tuple[bytes, socket.socket]
Sample = tuple[StoreMetric, tuple[str, ...], float | None]


class StoreCollector(Collector):
    """Turns the current status dict into metric families at each scrape."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Family]:
        """Yield one family per metric, even if it has no samples now."""
        families = {metric: _family(metric) for metric in StoreMetric}
        for metric, labels, value in _samples(self._status()):
            if value is not None:
                families[metric].add_metric(labels, value)
        yield from families.values()


def _family(metric: StoreMetric) -> CounterMetricFamily | GaugeMetricFamily:
    record = metric.value
    kind = CounterMetricFamily if record.is_counter else GaugeMetricFamily
    return kind(record.name, record.help, labels=record.labels)


def _samples(status: dict[str, Any]) -> Iterator[Sample]:
    yield StoreMetric.INFO, (status["version"], status["policy"]), 1
    for metric, key in (
        (StoreMetric.UPTIME, "uptime_s"),
        (StoreMetric.CLIENTS, "clients"),
        (StoreMetric.HITS, "hits"),
        (StoreMetric.MISSES, "misses"),
        (StoreMetric.EVICTIONS, "evictions"),
        (StoreMetric.READS_FAILED, "reads_failed"),
        (StoreMetric.IN_FLIGHT_NBYTES, "nbytes_in_flight"),
    ):
        yield metric, (), status[key]
    yield StoreMetric.LEASES, (), len(status["leases"])
    yield from _memory_samples(status)
    for hop, facts in status["hops"].items():
        yield StoreMetric.HOP_NBYTES, (hop,), facts["nbytes"]
        yield StoreMetric.HOP_SECONDS, (hop,), facts["seconds"]
        yield StoreMetric.HOP_LIMIT, (hop,), facts["limit_bps"]
    for kind, counts in status["jobs"].items():
        for state, count in counts.items():
            yield StoreMetric.JOBS, (kind, state), count


def _memory_samples(status: dict[str, Any]) -> Iterator[Sample]:
    pool = status["pool"]
    for state in ("free", "filling", "ready"):
        yield StoreMetric.POOL_SLOTS, (state,), pool[state]
    yield StoreMetric.POOL_KEPT, (), pool["kept"]
    yield StoreMetric.POOL_PINNED, (), pool["pinned"]
    yield StoreMetric.POOL_SLOT_NBYTES, (), pool["slot_nbytes"]
    for tier, facts in status["tiers"].items():
        yield StoreMetric.TIER_NBYTES, (tier,), facts.get("nbytes")  # the sizes of remotes are unknown
        yield StoreMetric.TIER_CAPACITY, (tier,), facts.get("capacity_nbytes")
        yield StoreMetric.TIER_CHECKPOINTS, (tier,), facts.get("checkpoints")
    known = [entry for entry in status["checkpoints"] if entry["rank"] is not None]  # rank None: only on disk
    largest = sorted(known, key=lambda entry: (-entry["resident_nbytes"], entry["name"], entry["rank"]))
    for entry in largest[:SERIES_MAX]:
        yield StoreMetric.RESIDENT_NBYTES, (entry["name"], str(entry["rank"])), entry["resident_nbytes"]


class MetricsServer:
    """Serves ``GET /metrics`` on 127.0.0.1 from ``start`` to ``stop``, in threads of its own.

    Args:
        status: returns the daemon's status dict; called from several threads.
        state_dir: the daemon's private folder, where the key is stored.
        port: the port; 0 picks a free one. ``self.port`` is the one in use.

    Raises:
        OSError: the port is taken. ConfigError: see ``open_key``.
    """

    def __init__(self, status: Status, state_dir: Path, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(StoreCollector(status))
        self._server = _ScrapeServer(("127.0.0.1", port), registry, open_key(state_dir / KEY_NAME))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="sllm-metrics", daemon=True)
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Start answering requests."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port without waiting for answers in progress. Stopping twice is harmless."""
        self._stopped.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _serve(self) -> None:
        """Serve until stopped; an error does not end the thread."""
        while not self._stopped.is_set():
            try:
                self._server.serve_forever(_STOP_POLL_S)
            except Exception:  # top of a run loop
                logger.exception("event=loop_failed loop='metrics'")
                self._stopped.wait(_PAUSE_S)


class _ScrapeServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = SCRAPES_MAX

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, key: str) -> None:
        self.registry = registry
        self.expected = f"Bearer {key}".encode()
        self._slots = threading.BoundedSemaphore(SCRAPES_MAX)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the host name lookup that http.server does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept a connection. Pauses if no descriptor is left, so that the loop does not spin."""
        try:
            return super().get_request()
        except OSError as error:
            if is_shortage(error):
                time.sleep(_PAUSE_S)
            raise

    def process_request(self, request: _Request, client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # e.g. no thread can be started
            self._slots.release()
            raise

    def process_request_thread(self, request: _Request, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: _Request, client_address: object) -> None:
        """Ignore a scraper that disconnected; log any other error with its traceback."""
        if not isinstance(sys.exception(), OSError):
            logger.warning("metrics=failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Handles one request per connection (HTTP/1.0)."""

    server: _ScrapeServer
    server_version = "sllm-store"
    sys_version = ""

    def handle(self) -> None:
        self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
        head = _read_head(self.connection)
        self.connection.settimeout(REQUEST_S_MAX)
        if head is None:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        self.rfile = io.BytesIO(head)
        self.handle_one_request()

    def do_GET(self) -> None:
        shown = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(shown, self.server.expected):
            self._answer(HTTPStatus.UNAUTHORIZED, b"", (("WWW-Authenticate", "Bearer"),))
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"")
        else:
            self._answer_scrape()

    def _answer_scrape(self) -> None:
        try:
            body = generate_latest(self.server.registry)
        except (SllmError, TimeoutError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            return
        self._answer(HTTPStatus.OK, body, (("Content-Type", CONTENT_TYPE_LATEST),))

    def _answer(self, code: HTTPStatus, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line for every scrape would only be noise."""


def _read_head(channel: socket.socket) -> bytes | None:
    """Read a request's line and headers, or the part that was sent before EOF; None if they are too large."""
    head = bytearray()
    end_s = time.monotonic() + REQUEST_S_MAX
    while b"\r\n\r\n" not in head:
        if len(head) >= HEAD_NBYTES_MAX:
            return None
        channel.settimeout(max(end_s - time.monotonic(), 0.001))
        data = channel.recv(HEAD_NBYTES_MAX + 1 - len(head))
        if not data:
            break
        head += data
    return bytes(head) if len(head) <= HEAD_NBYTES_MAX else None
