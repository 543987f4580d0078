"""Server side of connections: framing, handshake and refusals on asyncio; a handler processes the messages.

A faulty peer affects only itself: its connection is refused with a reason and closed, and the others continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from traceml.clock import monotonic_ns
from traceml.errors import ProtocolError
from traceml.formatting import left_text
from traceml.transport import auth
from traceml.transport.client_handshake import keep_alive
from traceml.transport.framing import MAX_FRAME_BYTES, MAX_HELLO_BYTES, WIRE_VERSION, Decoder, encode
from traceml.transport.handshakes import TLS_STATE_BYTES, OpenHandshakes, RefusalLog
from traceml.transport.hello import Hello, schemas
from traceml.transport.tls import ServerIdentity, TlsLayer

__all__ = [
    "BACKLOG", "BatchSelector", "Handler", "Peer", "RefusedError", "Server", "ServerStatistics",
]  # fmt: skip

# With asyncio's 100, a tenth of 10,000 ranks that connect at once would wait a second for a SYN retransmission.
BACKLOG = 4096
HANDSHAKE_S = 5.0
MANY_CONNECTIONS = 256
"""With fewer connections, `BatchSelector` pauses for none."""
# Ten thousand ranks that send once a second would wake the process ten thousand times a second: iterations of the loop
# and switches of the process were a third of the CPU time. An ack waits for a tick of 100 ms anyway.
_PAUSE_S = 0.01
# Time for a refused peer to read the reason before its connection is cut.
_LINGER_S = 2.0
# Left for stores, reports and deliveries; of few descriptors half.
_RESERVED_DESCRIPTORS = 64
# Some of these are for clients: a launcher must reach its aggregator when ranks have taken all others.
_RESERVED_FOR_CLIENTS = 4
_READ_BYTES = 256 << 10
_SCHEMAS = schemas()

_log = logging.getLogger("traceml")


class RefusedError(Exception):
    """Raised by a handler to refuse a peer; the text reaches the peer and the log.

    Args:
        retry: whether the reason is temporary, so that the peer may try again.
    """

    def __init__(self, why: str, *, retry: bool = False) -> None:
        super().__init__(why)
        self.retry = retry


class Handler(Protocol):
    """Handler of peers that have proved the token."""

    def welcome(self, peer: Peer) -> dict[str, Any]:
        """Admit a peer and return the welcome's fields other than the proof; may raise RefusedError."""

    def rows(self, peer: Peer, message: dict[str, Any]) -> None:
        """Handle a `rows` message; may raise RefusedError or ProtocolError."""

    def message(self, peer: Peer, message: dict[str, Any]) -> None:
        """Handle any other message; may raise RefusedError or ProtocolError."""

    def disconnected(self, peer: Peer) -> None:
        """Record that a welcomed peer's connection has ended."""


class ServerStatistics(msgspec.Struct, frozen=True):
    """Counters of a server, and its current connections."""

    connections: int
    handshakes_open: int
    accepted: int
    refused: int
    handler_errors: int


class Peer(asyncio.BufferedProtocol):
    """One connection, from challenge to close."""

    __slots__ = (
        "_decoder",
        "_server",
        "_tls",
        "_transport",
        "address",
        "context",
        "deadline_s",
        "hello",
        "nonce",
        "state",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._decoder = Decoder(MAX_HELLO_BYTES)
        self._tls = TlsLayer(server.tls.context, server_side=True) if server.tls is not None else None
        self._transport: asyncio.Transport | None = None
        self.address = "?"
        self.state = "new"  # new -> open -> closed, or -> refused -> closed
        self.hello: Hello | None = None
        self.context: Any = None
        """State of the handler for this peer."""
        self.nonce = b""
        self.deadline_s = 0.0

    def __repr__(self) -> str:
        role = f"{self.hello.role} {self.hello.rank} of {self.hello.run!r}" if self.hello else "unknown peer"
        return f"<{role} at {self.address}, {self.state}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the challenge, or refuse where no descriptor would be left for the store."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            keep_alive(sock)

        name = transport.get_extra_info("peername")
        self.address = f"{name[0]}:{name[1]}" if name else "?"
        self._server.admit(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return the buffer to read into."""
        return self._server.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Decode and dispatch; an error ends this connection alone."""
        data = bytes(self._server.read_buffer[:nbytes])
        if self.state == "refused":
            return  # only read, so that the close does not reset the connection before the peer reads the reason

        try:
            handler = self._server.handler
            messages = self._decoder.feed(data if self._tls is None else self._decrypt(self._tls, data))
            if self.state == "new":
                in_tls = self._tls.pending_bytes + TLS_STATE_BYTES if self._tls is not None else 0
                self._server.handshakes.hold(self, self._decoder.pending_bytes + in_tls)

            for message in messages:
                if self.state == "open":
                    if message["t"] == "rows":
                        handler.rows(self, message)
                    else:
                        self._message(message)
                elif self.state == "new":
                    self._greet(message)
        except (ProtocolError, RefusedError) as error:
            self.refuse(str(error), retry=getattr(error, "retry", False))
        except Exception:  # noqa: BLE001 - only this connection ends
            # A bug of ours or unexpected bytes.
            self._server.handler_errors += 1
            _log.exception("an error of the aggregator with %r; that connection is closed", self)
            self.refuse("internal error of the aggregator; see its log")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget the peer."""
        was_open = self.state == "open"
        self.state = "closed"
        _log.debug("%r", self)
        self._server.forget(self)
        if was_open:
            self._server.handler.disconnected(self)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, unless the peer is gone."""
        self.write(encode(message))

    def write(self, frames: bytes) -> None:
        """Send frames that are already encoded."""
        if self._transport is None or self.state not in ("new", "open"):
            return

        if self._tls is None:
            self._transport.write(frames)
        elif self._tls.ready:  # a peer that does not speak TLS gets no reason
            self._transport.write(self._tls.encrypt(frames))

    def pause(self, paused: bool) -> None:
        """Stop or resume reading: TCP then slows the peer, which keeps its rows."""
        if self._transport is None or self._transport.is_closing():
            return

        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def refuse(self, why: str, *, retry: bool = False) -> None:
        """Refuse the peer with a reason, also in the log, and close; with `retry` it may try again."""
        if self._transport is None or self.state in ("refused", "closed"):
            return

        host = self.address.rpartition(":")[0] or self.address
        self._server.refusals.record(f"{self.hello.role if self.hello else 'peer'} {host}", why)
        self._decoder.clear()
        self.send({"t": "refused", "why": why, **({"retry": True} if retry else {})})
        was_open, self.state = self.state == "open", "refused"
        self._server.count_refused(self)
        self._transport.resume_reading()
        with contextlib.suppress(OSError, RuntimeError):
            self._transport.write_eof()

        if was_open:
            self._server.handler.disconnected(self)

    def close(self) -> None:
        """Close after the written bytes have been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        self._decoder.clear()  # now: the transport ends in the next iteration, after thousands of others were read
        if self._transport is not None:
            self._transport.abort()

    def _decrypt(self, tls: TlsLayer, data: bytes) -> bytes:
        was_ready = tls.ready
        plain, reply = tls.receive(data)
        if reply and self._transport is not None:
            self._transport.write(reply)

        if tls.ready and not was_ready:
            self._server.challenge(self)

        return plain

    def _message(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "ping":
            self.send({"t": "pong", "ns": message.get("ns"), "epoch_ns": time.time_ns(), "mono_ns": monotonic_ns()})
        elif kind == "refused":
            _log.warning("%s left: %s", self.address, message.get("why"))
            self.close()
        else:
            self._server.handler.message(self, message)

    def _greet(self, message: dict[str, Any]) -> None:
        if message["t"] == "refused":
            _log.warning("peer %s left before its hello: %s", self.address, str(message.get("why"))[:500])
            self.close()
            return

        if message["t"] != "hello":
            raise ProtocolError(f"{message['t'][:50]!r} came before the hello")

        if message.get("v") != WIRE_VERSION:
            raise ProtocolError(f"the peer speaks wire version {message.get('v')!r}, this aggregator {WIRE_VERSION}")

        hello = Hello.from_message(message)
        proof, nonce = message.get("mac"), message.get("nonce")
        binding = self._server.tls.fingerprint if self._server.tls is not None else b""
        expected = auth.mac(self._server.token, self.nonce, hello.role, hello.run, hello.rank, binding)
        if not isinstance(proof, bytes) or not auth.same_mac(proof, expected):
            raise RefusedError("wrong token: both sides need the same TRACEML_TOKEN, or token in a file of settings")

        if not isinstance(nonce, bytes) or not 16 <= len(nonce) <= 64:
            raise ProtocolError("the hello's nonce is not 16 to 64 bytes")

        _check_schemas(hello.schemas)
        self.hello = hello = replace(hello, schemas={})  # the same layouts again, 19 kB of each of ten thousand ranks
        if hello.role != "client":
            self._server.check_room(_RESERVED_FOR_CLIENTS)

        extra = self._server.handler.welcome(self)
        answer = auth.mac(self._server.token, nonce, hello.role, hello.run, hello.rank, binding)
        self._decoder.limit_bytes = MAX_FRAME_BYTES
        self.send({"t": "welcome", "v": WIRE_VERSION, "mac": answer, **extra})
        self.state = "open"
        _log.debug("welcomed %r", self)
        self._server.handshakes.discard(self)


class Server:
    """Server that makes a `Peer` of each connection.

    Args:
        token: the secret that peers prove to know.
        tls: encrypt connections, with this certificate.
    """

    def __init__(self, handler: Handler, token: str, tls: ServerIdentity | None = None) -> None:
        self.handler = handler
        self.token = token
        self.tls = tls
        self.peers: set[Peer] = set()
        # One for all connections: a new one for each read, as asyncio has it, costs seven times the read itself.
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        self.handshakes = OpenHandshakes(tls=tls is not None)
        self.refusals = RefusalLog()
        self.handler_errors = 0
        self._accepted = self._refused = 0
        self._limit = _raise_descriptor_limit()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve connections of a bound socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Peer(self), sock=sock, backlog=BACKLOG)
        self._sweep()

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        if self._server is not None:
            self._server.close()

        if self._sweeper is not None:
            self._sweeper.cancel()

        for peer in list(self.peers):
            peer.close()

        await asyncio.sleep(0)

    def statistics(self) -> ServerStatistics:
        """Return the counters."""
        return ServerStatistics(
            len(self.peers), len(self.handshakes), self._accepted, self._refused, self.handler_errors
        )

    def admit(self, peer: Peer) -> None:
        """Send a new connection the challenge; with TLS after its handshake."""
        self._accepted += 1
        self.peers.add(peer)
        self.handshakes.add(peer, HANDSHAKE_S)
        try:
            self.check_room()
        except RefusedError as error:
            peer.refuse(str(error), retry=True)
            return

        if self.tls is None:
            self.challenge(peer)

    def challenge(self, peer: Peer) -> None:
        """Send the challenge."""
        peer.nonce = auth.server_nonce()
        peer.send({"t": "challenge", "v": WIRE_VERSION, "nonce": peer.nonce})

    def check_room(self, reserved: int = 0) -> None:
        """Check that another connection leaves enough descriptors.

        Args:
            reserved: how many more to leave.

        Raises:
            RefusedError: it does not; others may end.
        """
        room = self._limit - min(_RESERVED_DESCRIPTORS, self._limit // 2) - reserved
        if len(self.peers) > room:
            raise RefusedError(
                f"{room} connections are the most that this aggregator's descriptor limit of {self._limit} allows; "
                "start it after `ulimit -n 65536`", retry=True,
            )  # fmt: skip

    def forget(self, peer: Peer) -> None:
        """Remove a closed connection from all lists."""
        self.peers.discard(peer)
        self.handshakes.discard(peer)

    def count_refused(self, peer: Peer) -> None:
        """Count a refusal and give the peer time to read it."""
        self._refused += 1
        self.handshakes.add(peer, _LINGER_S)

    def _sweep(self) -> None:
        """Close connections without a hello, and refused ones after their time."""
        for peer in self.handshakes.overdue():
            if isinstance(peer, Peer) and peer.state == "new":
                peer.refuse(f"no hello within {left_text(HANDSHAKE_S)}", retry=True)
            else:
                peer.abort()

        self.handshakes.release_memory()
        self.refusals.flush()
        self._sweeper = asyncio.get_running_loop().call_later(0.5, self._sweep)


class BatchSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    """The default selector, with a pause between the first ready connection and the answer where there are many."""

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        super().__init__()
        self._sleep = sleep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; see `selectors.BaseSelector.select`."""
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
        if not ready or len(self.get_map()) < MANY_CONNECTIONS or (timeout is not None and timeout <= 0):
            return ready

        self._sleep(_PAUSE_S)
        return super().select(0)


def _raise_descriptor_limit() -> int:
    """Raise the descriptor limit of this process to its hard limit, one per connection; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:
            _log.info("the descriptor limit stays at %d: %s", soft, error)

    return soft if soft != resource.RLIM_INFINITY else 2**31


def _check_schemas(given: dict[str, Any]) -> None:
    """Refuse a peer whose rows have another layout."""
    if given == _SCHEMAS:
        return

    for name, layout in given.items():
        if name not in _SCHEMAS:
            raise RefusedError(f"unknown table {str(name)[:50]!r}")

        if layout != _SCHEMAS[name]:
            raise RefusedError(f"table {name!r} has another layout here; use the same traceml on both sides")
