"""The metrics' server bounds its connections, whoever opens them."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.eventually import eventually
from traceml.display.monitoring import metrics_server
from traceml.display.monitoring.active_runs import ActiveRuns


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server of a folder without runs."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = metrics_server._InheritedServer(listener)
    server.set_app(metrics_server.metrics_app(ActiveRuns(tmp_path), None))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield listener.getsockname()[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_others_cannot_take_all_threads(port: int, sent: bytes) -> None:
    """Of connections that do not end their request the oldest is cut, and Prometheus is answered."""
    with ExitStack() as stack:
        opened = []
        for _ in range(metrics_server._MAX_CONNECTIONS + 10):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)))
            opened[-1].sendall(sent)

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()
        assert _is_cut(opened[0])
        most = metrics_server._MAX_CONNECTIONS + 1
        eventually(lambda: _answering() <= most, "the threads of connections that were cut to end")


def _is_cut(sock: socket.socket) -> bool:
    """Wait for the end of a connection; it is a reset where the server has not read what was sent yet."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def _answering() -> int:
    return sum("process_request_thread" in each.name for each in threading.enumerate())
