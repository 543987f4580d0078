"""TLS between client and server, and the relay that it defeats."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from tests.eventually import eventually
from tests.transport.conftest import TOKEN, Serving
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, ProtocolError, TraceMLError
from traceml.transport import auth
from traceml.transport import server as server_module
from traceml.transport.client import Connection
from traceml.transport.hello import Hello
from traceml.transport.server import Server
from traceml.transport.tls import ServerIdentity, TlsLayer, client_context, make_identity

pytestmark = pytest.mark.process  # openssl makes the certificates


@pytest.fixture(scope="module")
def identity() -> ServerIdentity:
    return make_identity()


@pytest.fixture
def encrypted(identity: ServerIdentity, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """A server that speaks TLS only."""
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 120.0)  # on a busy machine a handshake takes long
    monkeypatch.setattr("tests.transport.conftest.Server", lambda handler, token: Server(handler, token, identity))
    running = Serving().start()
    yield running
    running.close()


def dial(port: int, *, tls: bool = True, token: str = TOKEN, timeout_s: float = 60) -> Connection:
    hello = Hello(role="rank", run="job", world_size=64)
    return Connection.connect("127.0.0.1", port, hello, token, timeout_s=timeout_s, tls=tls)


class Relay:
    """Forwards one connection between a client and a server, with TLS of its own on both sides, or without."""

    def __init__(self, port: int, identity: ServerIdentity | None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._to, self._identity = port, identity
        self.seen = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()
        self._thread.join(240)

    def _run(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._to))
        if self._identity is not None:
            client = self._identity.context.wrap_socket(client, server_side=True)
            server = client_context().wrap_socket(server)

        back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
        back.start()
        self._copy(client, server)
        back.join(240)
        client.close()
        server.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                target.sendall(data)
        except OSError:
            pass
        finally:
            end_of_stream(target)


def end_of_stream(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_rows_and_answers_pass_encrypted(encrypted: Serving) -> None:
    """Large frames too, in both directions; a relay that only looks sees no table's name."""
    relay = Relay(encrypted.port, None)
    connection = dial(relay.port)
    for number in range(20):
        connection.send_rows("steps", 1000 * number, 1000, b"steps" * 20_800)

    eventually(lambda: connection.receive(0.1) == [] and connection.acked["steps"] == 20_000)
    large = "x" * 3_000_000
    assert connection.request("echo", {"text": large}, timeout_s=60)["text"] == large
    assert connection.measure_clock(timeout_s=60) is not None
    connection.close("finished")

    eventually(lambda: encrypted.handler.gone_ranks == [0])
    assert len(encrypted.handler.rows_taken) == 20
    assert len(relay.seen) > 8_000_000
    assert b"steps" not in relay.seen
    relay.close()


def test_relay_with_a_certificate_of_its_own_is_found_out(encrypted: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """It reads what it forwards, but the proofs are bound to the certificate: the server's is another one."""
    relay = Relay(encrypted.port, make_identity())

    with pytest.raises(AggregatorRefusedError, match="wrong token"):
        dial(relay.port)

    assert b"challenge" in relay.seen  # it did read along
    assert encrypted.handler.gone_ranks == []
    assert "wrong token" in caplog.text
    relay.close()


def test_certificate_is_part_of_both_proofs(identity: ServerIdentity) -> None:
    """A server that answers with another fingerprint does not know the token, for a client with TLS."""
    proofs = {auth.mac("t", b"n" * 16, "rank", "job", 0, binding) for binding in (b"", identity.fingerprint, bytes(32))}

    assert len(proofs) == 3


def test_wrong_token_is_refused_with_its_reason(encrypted: Serving) -> None:
    with pytest.raises(AggregatorRefusedError, match="wrong token"):
        dial(encrypted.port, token="wrong")


def test_plain_client_is_reported_what_to_set(encrypted: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server waits for TLS, and the client for a challenge: neither hangs."""
    with monkeypatch.context() as context:
        context.setattr(server_module, "HANDSHAKE_S", 0.3)
        with pytest.raises(AggregatorUnavailableError, match="set TRACEML_TLS=1 here too"):
            dial(encrypted.port, tls=False)

    eventually(lambda: not encrypted.server.peers)
    dial(encrypted.port).close()


def test_plain_server_is_told_from_one_with_tls(serving: Serving) -> None:
    with pytest.raises(AggregatorUnavailableError, match=r"no TLS connection: .* Set TRACEML_TLS equally"):
        dial(serving.port)


def test_garbage_is_refused(encrypted: Serving) -> None:
    """Bytes that are no TLS end that connection only."""
    other = dial(encrypted.port)
    with encrypted.raw() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        eventually(lambda: encrypted.server.statistics().refused == 1)

    assert other.request("echo", {"text": "x"}, timeout_s=60)["text"] == "x"
    other.close()


def test_unauthenticated_peers_hold_little_state_together(encrypted: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS takes memory for each peer that begins a handshake: those that leave it at that are cut."""
    monkeypatch.setattr(encrypted.server.handshakes, "_limit_bytes", 500_000)
    begun = []
    for _ in range(50):
        begun.append(encrypted.raw())
        begun[-1].sendall(TlsLayer(client_context(), server_side=False).start())

    eventually(lambda: encrypted.server.handshakes.cut >= 40)
    assert 0 < encrypted.server.handshakes.held_bytes <= 500_000
    dial(encrypted.port).close()
    for sock in begun:
        sock.close()


def test_changed_bytes_are_an_error(identity: ServerIdentity) -> None:
    """An encrypted byte that was changed on the way is not taken for another."""
    client, server = TlsLayer(client_context(), server_side=False), TlsLayer(identity.context, server_side=True)
    _, answer = server.receive(client.start())
    _, last = client.receive(answer)
    server.receive(last)
    assert client.ready
    assert server.ready
    assert client.peer_fingerprint == identity.fingerprint
    frame = bytearray(client.encrypt(b"rows" * 100))
    frame[50] ^= 1

    with pytest.raises(ProtocolError, match="no TLS connection"):
        server.receive(bytes(frame))


def test_oldest_accepted_version_is_1_3(identity: ServerIdentity) -> None:
    assert identity.context.minimum_version is client_context().minimum_version is ssl.TLSVersion.TLSv1_3


def test_missing_openssl_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the aggregator's host needs it."""
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(TraceMLError, match="Install openssl"):
        make_identity()
