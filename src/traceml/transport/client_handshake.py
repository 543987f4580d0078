"""Handshake of a client with an aggregator."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from traceml.clock import own_time as time
from traceml.errors import AggregatorForeignError, AggregatorRefusedError, ProtocolError
from traceml.fork_gate import fork_gate
from traceml.transport import auth
from traceml.transport.framing import WIRE_VERSION, Decoder, encode
from traceml.transport.hello import Hello

if TYPE_CHECKING:
    from traceml.transport.tls import TlsLayer

__all__ = [
    "RECEIVE_BYTES",
    "SILENT",
    "ClientHandshake",
    "TemporaryRefusalError",
    "addresses_of",
    "client_tls",
    "keep_alive",
    "open_socket",
    "refusal",
]

RECEIVE_BYTES = 65536
SILENT = "a program listens there, but sent no"
"""Begin of the reason where a connection was taken and nothing came."""

_refusals: deque[tuple[str, int, str]] = deque(maxlen=20)

_log = logging.getLogger("traceml")
_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


class TemporaryRefusalError(ConnectionResetError):
    """The aggregator refused this peer for now, as on a full disk; the text is its reason."""


class ClientHandshake:
    """Handshake challenge -> hello -> welcome, over a socket that is not trusted yet."""

    def __init__(self, sock: socket.socket, host: str, port: int, deadline: float, tls: TlsLayer | None) -> None:
        self.decoder = Decoder()
        self.tls = tls
        self.early: list[dict[str, Any]] = []
        self._sock, self._host, self._port, self._deadline = sock, host, port, deadline

    def run(self, hello: Hello, token: str | None) -> dict[str, Any]:
        """Prove the token on both sides; return the welcome.

        Raises:
            AggregatorRefusedError: the other side refused, or does not know this token or version.
            OSError: it is gone, or too slow.
            ProtocolError: it sent something else.
        """
        if self.tls is not None:
            self._sock.sendall(self.tls.start())

        challenge = self._expect("challenge")
        if challenge.get("v") != WIRE_VERSION:
            raise self._reject(f"it speaks wire version {challenge.get('v')}, this traceml {WIRE_VERSION}")

        nonce = challenge.get("nonce")
        if not isinstance(nonce, bytes) or not 16 <= len(nonce) <= 64 or nonce.startswith(auth.CLIENT_NONCE_TAG):
            raise self._reject("its challenge has an invalid nonce")

        token = token or self._published_token()
        mine = auth.client_nonce()
        binding = self.tls.peer_fingerprint if self.tls is not None else b""
        proof = auth.mac(token, nonce, hello.role, hello.run, hello.rank, binding)
        self._send(hello.to_message(WIRE_VERSION, mine, proof))
        welcome = self._expect("welcome")
        expected = auth.mac(token, mine, hello.role, hello.run, hello.rank, binding)
        if not isinstance(welcome.get("mac"), bytes) or not auth.same_mac(welcome["mac"], expected):
            raise self._reject("it does not know the token")

        return welcome

    def _published_token(self) -> str:
        entry = auth.discover(self._port)
        if entry is None:
            raise self._reject(
                "no token is known for it: it was started by another user, on another host or in another container. "
                "Put its token into TRACEML_TOKEN, or start your own with `traceml serve --port 0` or "
                "traceml.init(local=True)",
                AggregatorForeignError,
            )

        return entry.token

    def _expect(self, kind: str) -> dict[str, Any]:
        while not self.early:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"{SILENT} {kind}{self._tls_hint(kind)}")

            self._sock.settimeout(left_s)
            try:
                with fork_gate.opened():
                    data = self._sock.recv(RECEIVE_BYTES)
            except TimeoutError:
                raise TimeoutError(f"{SILENT} {kind}{self._tls_hint(kind)}") from None

            if not data:
                raise ConnectionResetError(f"it closed the connection before its {kind}{self._tls_hint(kind)}")

            self.early = self.decoder.feed(data if self.tls is None else self._decrypt(self.tls, data))

        message = self.early.pop(0)
        if message["t"] == "refused":
            raise refusal(message, self._host, self._port)

        if message["t"] != kind:
            raise ProtocolError(f"it sent {message['t']!r} instead of {kind!r}")

        return message

    def _send(self, message: dict[str, Any]) -> None:
        frame = encode(message)
        self._sock.sendall(frame if self.tls is None else self.tls.encrypt(frame))

    def _decrypt(self, tls: TlsLayer, data: bytes) -> bytes:
        plain, reply = tls.receive(data)
        if reply:
            self._sock.sendall(reply)

        return plain

    def _tls_hint(self, kind: str) -> str:
        return " (if it uses TLS, set TRACEML_TLS=1 here too)" if self.tls is None and kind == "challenge" else ""

    def _reject(self, why: str, kind: type[AggregatorRefusedError] = AggregatorRefusedError) -> AggregatorRefusedError:
        """Send the reason for ending the handshake, so that both logs have it; return the error."""
        level = logging.INFO if kind is AggregatorForeignError else logging.WARNING  # often of no interest
        _log.log(level, "leaving the aggregator at %s:%d: %s", self._host, self._port, why)
        with contextlib.suppress(OSError):
            self._send({"t": "refused", "why": f"the client left: {why}"})

        return kind(self._host, self._port, why)


def client_tls() -> TlsLayer:
    """Return the encryption of a new connection."""
    from traceml.transport.tls import TlsLayer, client_context  # 10 ms, for nothing where connections are plain

    return TlsLayer(client_context(), server_side=False)


def addresses_of(host: str, port: int) -> Sequence[_Address]:
    """Return the addresses of a TCP server, as `socket.getaddrinfo` does.

    Raises:
        OSError: the name is not known.
    """
    # As bytes: for a name as text, the codec of international names and its tables are loaded, 260 KB in each rank.
    name = host.encode() if host.isascii() else host
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)


def open_socket(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to an aggregator.

    Raises:
        OSError: none listens there, or it did not answer in time.
    """
    addresses = addresses_of(host, port)
    with fork_gate.opened():  # for the connection, which may take long; no fork while a name is looked up
        sock = _connect_to_any(addresses, timeout_s)

    # A connect to a free ephemeral port can connect to itself: TCP allows a simultaneous open with one socket.
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("no program listens there")

    keep_alive(sock)
    return sock


def _connect_to_any(addresses: Sequence[_Address], timeout_s: float) -> socket.socket:
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return _connect_to(address, timeout_s)

    return _connect_to(addresses[-1], timeout_s)


def _connect_to(address: _Address, timeout_s: float) -> socket.socket:
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(timeout_s)
        sock.connect(place)
    except BaseException:
        sock.close()
        raise

    return sock


def refusal(message: dict[str, Any], host: str, port: int) -> ConnectionError:
    """Log a `refused` message and return its error: a temporary one (`retry`) counts as a lost connection.

    The same reason is a warning once: a peer that may try again does so often.
    """
    why = str(message.get("why"))
    known = (host, port, why) in _refusals
    _refusals.append((host, port, why))
    _log.log(
        logging.DEBUG if known else logging.WARNING, "the aggregator at %s:%d refused this peer: %s", host, port, why
    )
    return TemporaryRefusalError(why) if message.get("retry") else AggregatorRefusedError(host, port, why)


def keep_alive(sock: socket.socket) -> None:
    """Disable Nagle's algorithm, and detect within half a minute that the other host is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
