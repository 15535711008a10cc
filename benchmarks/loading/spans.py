"""How long vLLM's model runner took to load, from vLLM's own tracing: one definition for every load format.

vLLM opens a span around its runner's whole ``load_model`` and exports it to the address in OpenTelemetry's environment
variables. Here that is a small receiver. A runner without such a span logs the same duration instead.
"""

from __future__ import annotations

import gzip
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

RUNNER_SPAN_PREFIX = "Loading ("
"""``Loading (CPU)``, ``Loading (GPU)``: vLLM's names for its model runners' ``load_model``."""

_LOGGED = re.compile(r"Model loading took .* GiB memory and ([\d.]+) seconds")
_NANOSECOND = 1e-9


class SpanReceiver:
    """Receives spans over HTTP on a free port of this machine, as long as its context is open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seconds: dict[str, float] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="spans", daemon=True)

    def environment(self) -> dict[str, str]:
        """Environment variables that make a vLLM process export its spans here, without much delay."""
        return {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def wait_for(self, prefix: str, timeout_s: float) -> float | None:
        """Duration in seconds of the first span whose name starts with ``prefix``; None if none arrives in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(prefix) is not None, timeout_s)
            return self._find(prefix)

    def receive(self, body: bytes) -> None:
        """Process one export request."""
        request = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) * _NANOSECOND
                        self._seconds.setdefault(span.name, seconds)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _find(self, prefix: str) -> float | None:
        return next((seconds for name, seconds in self._seconds.items() if name.startswith(prefix)), None)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receive = self.receive

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receive(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        return Handler


def logged_load_s(log: str) -> float | None:
    """Seconds of the runner's ``load_model`` as logged by vLLM; None if it logged none."""
    found = _LOGGED.findall(log)
    return float(found[-1]) if found else None
