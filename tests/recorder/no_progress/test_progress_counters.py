"""Bytes of the connection that a thread waits for."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.eventually import eventually
from traceml.recorder.no_progress.progress_counters import received_bytes


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            yield peer, client


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, int]:
    """Run a function in a thread; return it with the kernel's number."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    assert thread.native_id is not None
    return thread, thread.native_id


@pytest.mark.parametrize("timeout_s", [None, 600.0])
def test_what_arrives_is_counted(connection: tuple[socket.socket, socket.socket], timeout_s: float | None) -> None:
    """Also with a timeout, with which Python waits by poll."""
    peer, client = connection
    client.settimeout(timeout_s)

    def read() -> None:
        while client.recv(100):
            pass

    thread, number = in_thread(read)
    for total in (5, 10):
        peer.sendall(b"parts")
        eventually(lambda total=total: received_bytes(number) == total, f"{total} bytes")

    peer.shutdown(socket.SHUT_WR)
    thread.join(240)
    assert not thread.is_alive()


def test_a_wait_for_something_else_has_none() -> None:
    """A pipe, and a lock."""
    reader, writer = os.pipe()
    lock = threading.Lock()
    lock.acquire()
    waits = [in_thread(lambda: os.read(reader, 1)), in_thread(lock.acquire)]

    assert [received_bytes(number) for _, number in waits] == [0, 0]

    os.close(writer)
    lock.release()
    for thread, _ in waits:
        thread.join(240)

    os.close(reader)
