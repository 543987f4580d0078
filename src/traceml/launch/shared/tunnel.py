"""TCP tunnel through a host's channel: ranks of another host reach the aggregator, and no port is opened.

The agent listens on its own loopback. Each connection there becomes a pair of the channel's streams, one per direction,
and a connection to the aggregator's loopback port at the launcher. The streams have their own flow control: a slow
reader delays no other connection.

Process: launcher and agent.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import selectors
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_streams import IncomingStream, OutgoingStream
from traceml.launch.shared.launch_messages import StreamOpened

__all__ = ["TunnelConnector", "TunnelListener"]

_WINDOW_BYTES = 256 << 10
_READ_BYTES = 64 << 10
_CONNECT_TIMEOUT_S = 1.0
# Every user of the host can connect to the listener, and only the aggregator, at the other end, asks for the token. A
# rank and each of its children that logs has one connection. The agent needs its other descriptors for the workers.
_SHARE, _MIN_RELAYS, _UNLIMITED = 4, 16, 4096
_MAX_USED = 0.75  # of the launcher's descriptors, all hosts together

_log = logging.getLogger("traceml")


class TunnelListener:
    """The agent's end of the tunnel: listens on the host's loopback for connections of ranks.

    Raises:
        OSError: no port is available.
    """

    def __init__(self, selector: selectors.BaseSelector, channel: Channel, *, job: str) -> None:
        self._selector, self._channel, self._job = selector, channel, job
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self._relays: dict[int, TunnelConnection] = {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(limit // _SHARE, _MIN_RELAYS) if limit != resource.RLIM_INFINITY else _UNLIMITED
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def port(self) -> int:
        """The port, on this host's loopback."""
        port: int = self._listener.getsockname()[1]
        return port

    def accept_answer(self, message: StreamOpened) -> bool:
        """Accept the stream that answers one of ours; return False if it belongs to another tunnel."""
        relay = self._relays.get(message.of)
        if relay is None:
            return False

        relay.receive_from(message.id)
        return True

    def close(self) -> None:
        """Close the listener and every connection."""
        self._selector.unregister(self._listener)
        self._listener.close()
        for relay in list(self._relays.values()):
            relay.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # closed again, or no descriptor left: the rank tries again
            return

        if len(self._relays) >= self._most:
            sock.close()  # the others end after some seconds, unless they prove the token; a rank tries again
            return

        outgoing = self._channel.open_stream(StreamOpened(kind="tunnel", job=self._job))
        relay = TunnelConnection(
            self._selector, self._channel, sock, outgoing, lambda: self._relays.pop(outgoing.id, None)
        )
        self._relays[outgoing.id] = relay


class TunnelConnector:
    """The launcher's end of the tunnel: connects to the aggregator for each connection of a host.

    Args:
        port: the aggregator's, on this host's loopback.
    """

    def __init__(self, selector: selectors.BaseSelector, channel: Channel, port: int) -> None:
        self._selector, self._channel, self._port = selector, channel, port
        self._relays: dict[int, TunnelConnection] = {}

    def accept_connection(self, number: int) -> None:
        """Connect for a new connection on the other side, which this stream announces."""
        outgoing = self._channel.open_stream(StreamOpened(kind="tunnel", of=number))
        try:
            sock = self._connected()
        except OSError as error:
            _log.debug("the tunnel's connection to port %d fails: %s", self._port, error)
            self._channel.accept(number, lambda _: None, lambda _: None)  # drops the bytes that are under way
            outgoing.end({"text": str(error)})
            return

        relay = TunnelConnection(self._selector, self._channel, sock, outgoing, lambda: self._relays.pop(number, None))
        self._relays[number] = relay
        relay.receive_from(number)

    def _connected(self) -> socket.socket:
        """Return a connection to the aggregator.

        Raises:
            OSError: nothing listens there, or the launcher needs its other descriptors.
        """
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=_CONNECT_TIMEOUT_S)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY or sock.fileno() < _MAX_USED * limit:  # the lowest free one is taken
            return sock

        sock.close()
        raise OSError(errno.EMFILE, f"few of {limit} file descriptors are left; start the job after `ulimit -n 65536`")

    def close(self) -> None:
        """Close every connection."""
        for relay in list(self._relays.values()):
            relay.close()


class TunnelConnection:
    """One connection: forwards the bytes of its socket to `outgoing`, and those of the other stream to the socket."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        channel: Channel,
        sock: socket.socket,
        outgoing: OutgoingStream,
        on_closed: Callable[[], object],
    ) -> None:
        self._selector, self._channel, self._sock, self._outgoing = selector, channel, sock, outgoing
        self._on_closed = on_closed
        self._incoming: IncomingStream | None = None
        self._waiting: deque[memoryview] = deque()
        self._read_ended = self._stream_ended = self._write_ended = self._closed = False
        self._events = 0
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        outgoing.on_drain = self._watch
        self._watch()

    def receive_from(self, number: int) -> None:
        """Forward the bytes of this stream."""
        self._incoming = self._channel.accept(
            number, self._take, self._take_end, window_bytes=_WINDOW_BYTES, manual=True
        )

    def close(self, why: str | None = None) -> None:
        """End both directions; bytes that are not written are dropped."""
        if self._closed:
            return

        self._closed = True
        self._waiting.clear()
        with contextlib.suppress(KeyError, ValueError):  # the owner's loop may have ended and closed its selector
            self._set_events(0)

        self._sock.close()
        if not self._read_ended:
            self._outgoing.end({"text": why or "closed"})

        self._on_closed()

    # --- from the socket to the channel ------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._read()

        if events & selectors.EVENT_WRITE and not self._closed:
            self._write()

        self._watch()

    def _read(self) -> None:
        room = min(_READ_BYTES, self._outgoing.writable_bytes)
        if room <= 0 or self._read_ended:
            return

        try:
            data = self._sock.recv(room)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return

        if data:
            self._outgoing.write(data)
            return

        self._read_ended = True
        self._outgoing.end()
        self._close_if_done()

    # --- from the channel to the socket ------------------------------------------------------------------------------

    def _take(self, data: memoryview) -> None:
        if self._closed:
            self._grant(len(data))
            return

        self._waiting.append(memoryview(bytes(data)))  # the channel reuses its buffer
        self._write()
        self._watch()

    def _take_end(self, error: dict[str, Any] | None) -> None:
        self._stream_ended = True
        if error is not None:
            self.close("the other end was closed")
        elif not self._closed:
            self._write()
            self._watch()

    def _write(self) -> None:
        try:
            while self._waiting:
                sent = self._sock.send(self._waiting[0])
                self._grant(sent)
                if sent < len(self._waiting[0]):
                    self._waiting[0] = self._waiting[0][sent:]
                else:
                    self._waiting.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return

        if self._stream_ended and not self._write_ended:
            self._write_ended = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

            self._close_if_done()

    def _grant(self, count: int) -> None:
        if self._incoming is not None:
            self._incoming.grant(count)

    # --- both --------------------------------------------------------------------------------------------------------

    def _close_if_done(self) -> None:
        if self._read_ended and self._write_ended:
            self.close()

    def _watch(self) -> None:
        """Watch the events that can be handled now."""
        if self._closed:
            return

        events = selectors.EVENT_WRITE if self._waiting else 0
        if not self._read_ended and self._outgoing.writable_bytes > 0:
            events |= selectors.EVENT_READ

        self._set_events(events)

    def _set_events(self, events: int) -> None:
        if events == self._events:
            return

        if not self._events:
            self._selector.register(self._sock, events, self._ready)
        elif not events:
            self._selector.unregister(self._sock)
        else:
            self._selector.modify(self._sock, events, self._ready)

        self._events = events
