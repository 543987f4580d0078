"""Connections without the cookie cannot take the page from its user."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from traceml.display.web.token_middleware import cookie_name, cookie_value
from traceml.display.web.unauthenticated_connections import MAX_UNAUTHENTICATED, UnauthenticatedConnections
from traceml.supervise.page_process import PageProcess


class CutTransport:
    """A transport that only knows whether it was cut."""

    is_cut = False

    def abort(self) -> None:
        self.is_cut = True


def test_the_oldest_of_too_many_is_cut() -> None:
    """A connection that showed the cookie, or was closed, no longer counts."""

    async def connect() -> list[bool]:
        counted, transports = UnauthenticatedConnections(2), [CutTransport() for _ in range(5)]
        for port, transport in enumerate(transports[:2]):
            counted.add(("127.0.0.1", port), transport)  # type: ignore[arg-type]

        counted.discard(("127.0.0.1", 0))
        counted.discard(None)
        for port, transport in enumerate(transports[2:], 2):
            counted.add(("127.0.0.1", port), transport)  # type: ignore[arg-type]

        assert len(counted) == 2
        return [transport.is_cut for transport in transports]

    assert asyncio.run(connect()) == [False, True, True, False, False]


def test_a_port_that_is_used_again_is_another_connection() -> None:
    """Its time begins anew, and it is the newest."""

    async def connect() -> list[bool]:
        counted, transports = UnauthenticatedConnections(2), [CutTransport() for _ in range(4)]
        for port, transport in zip((7, 8, 7, 9), transports, strict=True):
            counted.add(("127.0.0.1", port), transport)  # type: ignore[arg-type]

        return [transport.is_cut for transport in transports]

    assert asyncio.run(connect()) == [False, True, False, False]


@contextlib.contextmanager
def silent_connections(port: int, sent: bytes, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that begin a request and never end it."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            sock.sendall(sent)
            opened.append(sock)

        yield opened


def _read_to_end(sock: socket.socket) -> bytes:
    """Return what a connection is answered until it is cut."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)

    return b"".join(parts)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx"]
)
def test_others_cannot_take_all_connections_of_the_page(page_process: PageProcess, sent: bytes) -> None:
    """Of idle connections, endless headers and endless bodies the oldest are cut; the user is answered."""
    cookie = f"{cookie_name(page_process.port)}={cookie_value(page_process.token)}"
    with silent_connections(page_process.port, sent, MAX_UNAUTHENTICATED + 50) as opened:
        connection = http.client.HTTPConnection("127.0.0.1", page_process.port, timeout=60)
        connection.request("GET", "/", headers={"Cookie": cookie})
        assert connection.getresponse().status == 200
        connection.close()
        answer = _read_to_end(opened[0])

    assert not answer or answer.startswith(b"HTTP/1.1 401")


def test_a_planted_storage_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder is everyone's: neither a pipe there stops the page, nor is a link there written through."""
    planted = tmp_path / "tmp" / "traceml-page-storage"
    planted.mkdir(parents=True)
    os.mkfifo(planted / "storage-general.json")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with PageProcess(tmp_path, 0, nice=0) as page:
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
        connection.request("GET", f"/?token={page.token}")
        assert connection.getresponse().status == 303
        connection.close()
