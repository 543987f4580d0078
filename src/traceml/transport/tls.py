"""Encryption of a connection with TLS 1.3, between bytes of the socket and bytes of frames, for both sides.

The server's certificate is made at its start and signed by nobody. The proofs of the token include its fingerprint: a
relay between two connections has another certificate, so neither side accepts the other's proof.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import msgspec

from traceml.errors import ProtocolError, TraceMLError
from traceml.transport.auth import runtime_folder

__all__ = ["ServerIdentity", "TlsLayer", "client_context", "make_identity"]

_READ_BYTES = 65536
_DAYS = "3650"  # a certificate lives as long as its aggregator; nobody checks its date
_MAKE_TIMEOUT_S = 30.0


class ServerIdentity(msgspec.Struct, frozen=True):
    """Key and certificate of a server."""

    context: ssl.SSLContext  # settings of its connections
    fingerprint: bytes  # SHA-256 of the certificate, the part of both proofs that binds them to it


class TlsLayer:
    """TLS of one connection. It reads and writes no socket.

    Args:
        context: settings with the certificate, or for a client those of `client_context`.
        server_side: whether this is the server's end.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=server_side)
        self.ready = False
        """Whether the handshake of TLS is over."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of a record that has arrived in part."""
        return self._received.pending

    @property
    def peer_fingerprint(self) -> bytes:
        """SHA-256 of the server's certificate, for the client."""
        return hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").digest()

    def start(self) -> bytes:
        """Return the first bytes to send; only a client has some."""
        self._shake_hands()
        return self._to_send.read()

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take bytes of the socket; return the decrypted bytes, and bytes to send at once.

        Raises:
            ProtocolError: it is no TLS, or not of this connection.
        """
        self._received.write(data)
        parts = []
        try:
            if not self.ready:
                self._shake_hands()

            while self.ready and (part := self._read()):
                parts.append(part)
        except ssl.SSLError as error:
            raise ProtocolError(
                f"no TLS connection: {error.reason or error}. Set TRACEML_TLS equally on both sides"
            ) from error

        return b"".join(parts), self._to_send.read()

    def encrypt(self, data: bytes) -> bytes:
        """Return the bytes to send for `data`."""
        self._tls.write(data)  # a memory buffer takes all
        return self._to_send.read()

    def _shake_hands(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            self.ready = True

    def _read(self) -> bytes:
        try:
            return self._tls.read(_READ_BYTES)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return b""


@cache
def client_context() -> ssl.SSLContext:
    """Return the settings of a client: any certificate, as the server's proof shows whether it is the right one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def make_identity() -> ServerIdentity:
    """Make a key and a certificate with the program `openssl`.

    Raises:
        TraceMLError: there is no such program, or it failed.
    """
    with tempfile.TemporaryDirectory(dir=runtime_folder()) as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-subj", "/CN=traceml", "-days", _DAYS, "-keyout", str(key), "-out", str(certificate)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_MAKE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TraceMLError(
                f"tls needs a certificate, and the program openssl cannot make one: {error}. Install openssl on the "
                "aggregator's host, or leave tls off"
            ) from error

        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise TraceMLError(f"openssl cannot make a certificate: {said[-1] if said else done.returncode}")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # connections are not resumed
        context.load_cert_chain(certificate, key)
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
        return ServerIdentity(context, hashlib.sha256(der).digest())
