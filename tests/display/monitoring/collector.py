"""A receiver of OTLP over HTTP in this process, which decodes what it gets."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Collector", "collecting"]


class Collector:
    """Everything that was received.

    Attributes:
        url: its base address.
        metrics: metric requests, spans: trace requests, in the order of arrival.
        status: the answer to further requests.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.traces: list[ExportTraceServiceRequest] = []
        self.arrived = threading.Event()
        self.status = 200

    def points(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return the newest values by name and attributes."""
        found = {}
        for each in (
            m for request in self.metrics for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics
        ):
            for point in (*each.gauge.data_points, *each.sum.data_points):
                key = tuple(sorted((item.key, item.value.string_value) for item in point.attributes))
                found[each.name, key] = point.as_double or float(point.as_int)

        return found

    def spans(self) -> list[Any]:
        """Return all spans, in the order of arrival."""
        return [
            span for request in self.traces for r in request.resource_spans for s in r.scope_spans for span in s.spans
        ]


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Receive at a port of loopback; 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            if collector.status == 200:
                if self.path == "/v1/metrics":
                    collector.metrics.append(ExportMetricsServiceRequest.FromString(body))
                elif self.path == "/v1/traces":
                    collector.traces.append(ExportTraceServiceRequest.FromString(body))

            self._answer(collector.status)
            collector.arrived.set()

        def do_GET(self) -> None:
            self._answer(200)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if status in (301, 302, 307):
                self.send_header("Location", "/moved")

            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    collector = Collector(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
