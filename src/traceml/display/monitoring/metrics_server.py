"""Server of `/metrics` for Prometheus, on a socket inherited from the parent process."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from traceml.renderers.monitoring_metrics import Instrument
from traceml.renderers.monitoring_readings import Reading

if TYPE_CHECKING:
    from traceml.display.monitoring.active_runs import ActiveRuns

__all__ = ["metrics_app", "serve_metrics"]

_METRICS_PATH = "/metrics"
_REQUEST_TIMEOUT_S = 10.0  # a client that sends nothing must not hold a thread
# Each has a thread, also before its token is known. Prometheus uses one; above this many the oldest is cut.
_MAX_CONNECTIONS = 64
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_TEXT = ("Content-Type", "text/plain; charset=utf-8")

_log = logging.getLogger("traceml")

_StartResponse = Callable[[str, list[tuple[str, str]]], object]
_App = Callable[[dict[str, Any], _StartResponse], Iterable[bytes]]


def serve_metrics(runs: ActiveRuns, sock: socket.socket, token: str | None) -> None:
    """Answer requests until a signal ends the process.

    Args:
        token: the bearer token that requests need; None if only this host reaches the socket.
    """
    server = _InheritedServer(sock)
    server.set_app(metrics_app(runs, token))
    runs.snapshot()  # the first one imports the diagnosis, which takes most of a second
    server.serve_forever()


def metrics_app(runs: ActiveRuns, token: str | None) -> _App:
    """Return the WSGI application that answers `/metrics`; see `serve_metrics`."""
    registry = CollectorRegistry()
    registry.register(_RunsCollector(runs))
    answer: _App = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        if (refusal := _refusal(environ, token)) is not None:
            status, headers, text = refusal
            start_response(status, [_TEXT, *headers])
            return [f"{text}\n".encode()]

        return answer(environ, start_response)

    return app


def _metric_families(found: Iterable[Reading]) -> list[Metric]:
    """Return values as Prometheus metrics, each with its help and all its series."""
    families: dict[Instrument, Metric] = {}
    for each in found:
        family = families.get(each.instrument)
        if family is None:
            family = families[each.instrument] = _family(each.instrument)

        family.add_metric(each.labels, each.value)

    return list(families.values())


def _family(instrument: Instrument) -> Metric:
    kind = CounterMetricFamily if instrument.counter else GaugeMetricFamily
    return kind(instrument.prometheus_name, instrument.help, labels=instrument.labels)


def _refusal(environ: dict[str, Any], token: str | None) -> tuple[str, list[tuple[str, str]], str] | None:
    """Return status, headers and text for a request that is not answered; None for one that is."""
    if token is not None:
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        is_given = hmac.compare_digest(given.strip(" ").encode("latin-1", "replace"), token.encode())
        if scheme.lower() != "bearer" or not is_given:
            return "401 Unauthorized", [("WWW-Authenticate", "Bearer")], "This address needs its bearer token."
    elif _asked_host(environ) not in _LOOPBACK:
        # A page of another site can make a browser ask here, under a name that its owner resolves to loopback.
        return "403 Forbidden", [], "Ask by the name localhost."

    if environ["PATH_INFO"] != _METRICS_PATH:
        return "404 Not Found", [], f"The metrics are at {_METRICS_PATH}."

    return None


def _asked_host(environ: dict[str, Any]) -> str | None:
    try:
        return urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname
    except ValueError:  # a bracket that is not closed
        return None


class _RunsCollector:
    """Reads the runs at each request."""

    def __init__(self, runs: ActiveRuns) -> None:
        self._runs = runs

    def describe(self) -> list[Metric]:
        """Return nothing: the registry must not read the runs to learn names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its values."""
        yield from _metric_families(self._runs.snapshot().readings())


class _QuietHandler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        _log.debug(format, *args)


class _InheritedServer(ThreadingMixIn, WSGIServer):
    """A WSGI server on a socket that listens already, with a bounded number of connections."""

    daemon_threads = True

    def __init__(self, sock: socket.socket) -> None:
        WSGIServer.__init__(self, sock.getsockname()[:2], _QuietHandler, bind_and_activate=False)
        self.socket.close()
        self.socket: socket.socket = sock
        self.server_name, self.server_port = sock.getsockname()[:2]
        self.setup_environ()
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection on a thread; of too many the oldest is cut."""
        oldest = None
        with self._lock:
            self._open[request] = None
            if len(self._open) > _MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]

        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it

        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's
        """Log an error of a connection, such as a browser's that asks nothing; the base class prints it."""
        _log.debug("a connection from %s ended: %r", client_address, sys.exc_info()[1])

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that was answered."""
        with self._lock:
            self._open.pop(request, None)

        super().shutdown_request(request)
