"""Connections through a channel: whole, apart from each other, and ended on both sides."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

from traceml.launch.shared import tunnel
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.launch_messages import StreamOpened
from traceml.launch.shared.tunnel import TunnelConnector, TunnelListener


class Between:
    """Agent and launcher in one loop on a thread, with a real server at the launcher's end."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(60)
        self.selector = selectors.DefaultSelector()
        ours, theirs = socket.socketpair()
        self._channels = [
            Channel(os.dup(ours.fileno()), os.dup(ours.fileno()), side="agent"),
            Channel(os.dup(theirs.fileno()), os.dup(theirs.fileno()), side="launcher"),
        ]
        ours.close()
        theirs.close()
        self.listener = TunnelListener(self.selector, self._channels[0], job="job 1")
        self.connector = TunnelConnector(self.selector, self._channels[1], self.server.getsockname()[1])
        self.announced: list[StreamOpened] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a connection through the tunnel."""
        near = socket.create_connection(("127.0.0.1", self.listener.port), timeout=60)
        far, _ = self.server.accept()
        far.settimeout(60)
        return near, far

    def close(self) -> None:
        if self._stop.is_set():
            return

        self._stop.set()
        self._thread.join()
        self.listener.close()
        self.selector.close()
        self.connector.close()
        for channel in self._channels:
            channel.close()

        self.server.close()

    def _loop(self) -> None:
        agent, launcher = self._channels
        for channel in self._channels:
            self.selector.register(channel.read_fd, selectors.EVENT_READ, lambda _events: None)

        while not self._stop.is_set():
            for channel in self._channels:
                channel.flush()

            for key, events in self.selector.select(0.01):
                key.data(events)

            for message in agent.receive():
                assert isinstance(message, StreamOpened)
                assert self.listener.accept_answer(message)

            for message in launcher.receive():
                assert isinstance(message, StreamOpened)
                self.announced.append(message)
                self.connector.accept_connection(message.id)


@pytest.fixture
def between() -> Iterator[Between]:
    made = Between()
    yield made
    made.close()


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 20):
        parts.append(part)

    return b"".join(parts)


def test_bytes_arrive_whole_in_both_directions(between: Between) -> None:
    """Far more than any buffer passes unchanged, and the end of one direction leaves the other open."""
    near, far = between.connect()
    data = os.urandom(8 << 20)
    with near, far:
        sender = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_all(far) == data
        sender.join()

        sender = threading.Thread(target=lambda: (far.sendall(data[::-1]), far.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_all(near) == data[::-1]
        sender.join()

    assert between.announced[0].job == "job 1"


def test_a_connection_that_nobody_reads_holds_back_no_other(between: Between) -> None:
    """Flow control is each connection's own: what waits is bounded, and the others go on."""
    stuck, unread = between.connect()
    with stuck, unread:
        stuck.settimeout(1)
        with pytest.raises(TimeoutError):
            stuck.sendall(bytes(16 << 20))

        near, far = between.connect()
        with near, far:
            near.sendall(b"ping")
            assert far.recv(4) == b"ping"


def test_an_end_that_dies_is_reported_to_the_other(between: Between) -> None:
    """A rank, or an aggregator, that is gone leaves no connection open on the other side."""
    near, far = between.connect()
    near.close()
    assert far.recv(1) == b""
    far.close()

    near, far = between.connect()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, as from a killed process
    far.close()
    with near:
        assert near.recv(1) == b""


def test_nobody_at_the_end_is_no_connection(between: Between) -> None:
    """Without an aggregator the rank's connection ends at once, so that it tries again later."""
    between.server.close()
    with socket.create_connection(("127.0.0.1", between.listener.port), timeout=60) as near:
        assert near.recv(1) == b""


def test_others_cannot_take_all_descriptors_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user of the host can connect: above a share of the limit connections end at once, and later ones pass."""
    monkeypatch.setattr(tunnel, "_MIN_RELAYS", 2)
    monkeypatch.setattr(tunnel, "_SHARE", 1 << 30)
    between = Between()
    try:
        first, second = between.connect(), between.connect()
        with socket.create_connection(("127.0.0.1", between.listener.port), timeout=60) as refused:
            assert refused.recv(1) == b""

        for end in first:
            end.close()

        second[0].sendall(b"ping")
        assert second[1].recv(4) == b"ping"
        with contextlib.closing(_connected(between)) as third:
            third.sendall(b"x")

        for end in second:
            end.close()
    finally:
        between.close()


def test_connections_leave_descriptors_to_the_launcher(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a share of its limit a connection ends at once, with what it has sent; earlier and later ones pass."""
    ends = between.connect()
    ends[0].sendall(b"first")
    assert ends[1].recv(5) == b"first"  # the launcher has counted its descriptors for this connection
    with monkeypatch.context() as patch:
        patch.setattr(tunnel, "_MAX_USED", 0.0)
        with socket.create_connection(("127.0.0.1", between.listener.port), timeout=60) as refused:
            refused.sendall(b"lost")
            assert _is_ended(refused)

    late = _next(between)
    for near, far in (ends, late):
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        near.close()
        far.close()


def _next(between: Between) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new connection; the refused one was accepted and closed by the launcher before."""
    near = socket.create_connection(("127.0.0.1", between.listener.port), timeout=60)
    near.sendall(b"next")
    while True:
        far, _ = between.server.accept()
        far.settimeout(60)
        if far.recv(4) == b"next":
            return near, far

        far.close()


def _is_ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def _connected(between: Between) -> socket.socket:
    """Return a connection that passes, as soon as there is room again."""
    while True:
        near = socket.create_connection(("127.0.0.1", between.listener.port), timeout=60)
        between.server.settimeout(0.2)
        try:
            between.server.accept()[0].close()
        except TimeoutError:
            near.close()
        else:
            return near


def test_it_can_be_closed_after_the_loop(between: Between) -> None:
    """A connection that is open when the owner's loop has ended is closed all the same."""
    near, far = between.connect()
    with near, far:
        far.sendall(b"x")
        assert near.recv(1) == b"x"
        between.close()
        assert far.recv(1) == b""
