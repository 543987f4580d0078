from __future__ import annotations

import socket
import struct

import msgpack
import pytest

from tests.eventually import eventually
from tests.transport.conftest import TOKEN
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.transport import auth
from traceml.transport import server as server_module
from traceml.transport.client import connect
from traceml.transport.framing import MAX_HELLO_BYTES, Decoder, encode
from traceml.transport.hello import Hello


def answers(sock: socket.socket) -> list[dict]:
    """Read until the server closes."""
    decoder, messages = Decoder(), []
    try:
        while data := sock.recv(65536):
            messages += decoder.feed(data)
    except ConnectionResetError:
        pass

    return messages


def refusal(sock: socket.socket) -> str:
    last = answers(sock)[-1]
    assert last["t"] == "refused"
    return last["why"]


def hello_message(sock: socket.socket, **changed) -> bytes:
    challenge = Decoder().feed(sock.recv(65536))[0]
    hello = Hello(role="rank", run="job", rank=0, world_size=1)
    proof = auth.mac(TOKEN, challenge["nonce"], hello.role, hello.run, hello.rank)
    return encode({**hello.to_message(1, auth.client_nonce(), proof), **changed})


def test_wrong_token_is_refused_and_both_log_it(serving, caplog):
    """A wrong token ends the connection with a reason, on both sides' logs, and no other."""
    other = serving.connect(1)

    with pytest.raises(AggregatorRefusedError, match="wrong token"):
        serving.connect(0, token="wrong")

    assert caplog.text.count("wrong token") == 2
    other.send_rows("steps", 0, 1, bytes(104))
    eventually(lambda: other.receive(0.1) == [] and other.acked["steps"] == 1)
    other.close()


def test_proof_for_another_rank_does_not_count(serving):
    """The proof binds role, run and rank: it is of no use for another."""
    with serving.raw() as sock:
        sock.sendall(hello_message(sock, world_size=2, rank=1))

        assert refusal(sock).startswith("wrong token: ")


def test_other_version_is_refused(serving, caplog):
    """A peer of another version learns which one is spoken here."""
    with serving.raw() as sock:
        sock.sendall(hello_message(sock, v=2))

        assert "wire version 2" in refusal(sock)

    assert "wire version 2" in caplog.text


@pytest.mark.parametrize(
    ("schemas", "why"),
    [({"unheard_of": "msgpack"}, "unknown table 'unheard_of'"), ({"steps": [["step", "q"]]}, "another layout")],
)
def test_unknown_or_different_tables_are_refused(serving, schemas, why):
    """Rows that would be read wrongly are not taken."""
    with serving.raw() as sock:
        sock.sendall(hello_message(sock, schemas=schemas))

        assert why in refusal(sock)


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "is announced"),
        (b"\x00\x00\x00\x05hello", "is not msgpack"),
        (struct.pack(">I", MAX_HELLO_BYTES + 1), "above the cap"),
        (encode({"t": "rows", "table": "steps", "seq": 0, "n": 1, "data": b""}), "before the hello"),
        (encode({"t": "hello", "v": 1}), "lacks"),
        (struct.pack(">I", 3) + msgpack.packb([1, 2]), "not a map"),
    ],
)
def test_garbage_before_the_hello_is_refused(serving, garbage, why):
    """Unknown peers get a reason and nothing else; connected peers are not affected."""
    other = serving.connect(1)
    with serving.raw() as sock:
        sock.sendall(garbage)

        assert why in refusal(sock)

    other.send_rows("steps", 0, 1, bytes(104))
    eventually(lambda: other.receive(0.1) == [] and other.acked["steps"] == 1)
    other.close()


def test_oversized_frame_of_a_rank_is_refused(serving):
    """A welcomed peer must keep the cap too; it gets the reason."""
    connection = serving.connect()
    connection._sock.sendall(struct.pack(">I", 9 * 1024 * 1024) + bytes(1000))

    with pytest.raises(AggregatorRefusedError, match="above the cap"):
        eventually(lambda: connection.receive(0.2))

    eventually(lambda: serving.handler.gone_ranks == [0])
    connection.close()


def test_half_open_connections_are_ended(serving, monkeypatch):
    """A peer without a hello gets a reason and is cut off; others connect meanwhile."""
    with monkeypatch.context() as context:
        context.setattr(server_module, "HANDSHAKE_S", 0.3)
        silent = [serving.raw() for _ in range(20)]
        half = serving.raw()
        half.sendall(b"\x00\x00")
        eventually(lambda: serving.server.statistics().accepted == 21)

    serving.connect().close()
    for sock in (*silent, half):
        assert "no hello within" in refusal(sock)
        sock.close()

    eventually(lambda: not serving.server.peers)
    assert serving.server.statistics().refused == 21


def test_error_of_ours_costs_only_that_connection(serving, caplog):
    """A mistake in the handler is logged with its traceback and counted; the server goes on."""
    connection = serving.connect()
    connection.send({"t": "rows", "table": "broken", "seq": 0, "n": 1, "data": b""})

    with pytest.raises(AggregatorRefusedError, match="internal error"):
        eventually(lambda: connection.receive(0.2))

    connection.close()
    assert "ZeroDivisionError" in caplog.text
    assert serving.server.statistics().handler_errors == 1
    serving.connect().close()


def test_full_descriptor_table_is_a_reason_that_passes(serving):
    """Beyond the limit of descriptors new peers are refused for now."""
    serving.server._limit = 0

    with pytest.raises(AggregatorUnavailableError, match="descriptor limit"):
        serving.connect()


def test_the_layouts_of_a_rank_are_not_kept(serving):
    """They are those of this aggregator, and 19 kB of each of ten thousand ranks."""
    connection = serving.connect(3)
    (peer,) = serving.server.peers

    assert (peer.hello.rank, peer.hello.schemas) == (3, {})
    connection.close()


def test_few_descriptors_leave_room_for_a_launcher(serving):
    """Half of them serve connections, and the last four no ranks: `traceml run` must reach its aggregator."""
    serving.server._limit = 16
    ranks = [serving.connect(rank) for rank in range(4)]
    with pytest.raises(AggregatorUnavailableError, match="descriptor limit of 16"):
        serving.connect(4)

    eventually(lambda: len(serving.server.peers) == 4)
    clients = [connect("127.0.0.1", serving.port, Hello(role="client"), TOKEN) for _ in range(4)]
    with pytest.raises(AggregatorUnavailableError, match="descriptor limit of 16"):
        connect("127.0.0.1", serving.port, Hello(role="client"), TOKEN, tries=1)

    for connection in (*ranks, *clients):
        connection.close()


def test_a_refusal_that_comes_again_is_warned_about_once(serving, caplog):
    """A peer that may try again does so for minutes."""
    serving.server._limit = 0
    for _ in range(5):
        with pytest.raises(AggregatorUnavailableError):
            serving.connect()

    assert caplog.text.count("refused this peer") == 1


def test_unauthenticated_peers_hold_few_bytes_together(serving, monkeypatch):
    """Each may send a hello in parts, but many that leave it at that are cut; a rank is welcome meanwhile."""
    monkeypatch.setattr(serving.server.handshakes, "_limit_bytes", 500_000)
    parked = []
    for _ in range(100):
        parked.append(serving.raw())
        parked[-1].sendall(struct.pack(">I", 60_000) + bytes(50_000))

    eventually(lambda: serving.server.handshakes.cut >= 90)
    assert 0 < serving.server.handshakes.held_bytes <= 500_000
    serving.connect().close()
    for sock in parked:
        sock.close()

    eventually(lambda: not serving.server.peers)
    assert serving.server.handshakes.held_bytes == 0


def test_vanishing_in_the_middle_of_a_frame_is_noticed(serving):
    """A peer that goes away with half a frame sent is forgotten, and the half frame with it."""
    connection = serving.connect(5)
    connection._sock.sendall(struct.pack(">I", 1000) + bytes(10))
    connection.close()

    eventually(lambda: serving.handler.gone_ranks == [5])
    assert serving.handler.rows_taken == []
