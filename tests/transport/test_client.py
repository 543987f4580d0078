from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.eventually import eventually
from tests.ports import free_port
from tests.transport.conftest import TOKEN, Serving
from traceml.clock import monotonic_ns
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, TraceMLError
from traceml.fork_gate import fork_gate
from traceml.transport import auth, client
from traceml.transport.client import Connection, connect
from traceml.transport.framing import Decoder, encode
from traceml.transport.hello import Hello


class FalseServer:
    """Something that listens and answers with what the test says."""

    def __init__(self, *answers: bytes) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self.heard: list[dict] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> FalseServer:
        return self

    def __exit__(self, *_) -> None:
        self._thread.join(240)
        self.sock.close()

    def _serve(self) -> None:
        connection, _ = self.sock.accept()
        decoder = Decoder()
        with connection:
            for answer in self._answers:
                connection.sendall(answer)
                self.heard += decoder.feed(connection.recv(65536))

            try:
                while data := connection.recv(65536):
                    self.heard += decoder.feed(data)
            except ConnectionResetError:
                pass


def challenge(**changed) -> bytes:
    return encode({"t": "challenge", "v": 1, "nonce": b"s" * 32, **changed})


def dial(port: int, token: str | None = TOKEN, timeout_s: float = 60.0) -> Connection:
    return Connection.connect("127.0.0.1", port, Hello(run="job"), token, timeout_s=timeout_s)


def test_welcome_says_where_to_continue(serving):
    """The welcome's `acked` is where the recorder resumes; its other facts are at hand."""
    connection = serving.connect()

    assert connection.acked == {"steps": 7}
    assert connection.welcome["run_dir"] == "/runs/the-run"
    connection.close()


def test_acks_move_on(serving):
    """Rows that are acknowledged show in `acked`, not among the messages."""
    connection = serving.connect()

    size = connection.send_rows("steps", 7, 2, bytes(208))
    eventually(lambda: connection.receive(0.1) == [] and connection.acked["steps"] == 9)

    assert serving.handler.rows_taken == [("steps", 7, 2)]
    assert connection.bytes_sent == size
    connection.close()


def test_request_keeps_other_messages(serving):
    """Messages before a reply, and behind it in the same read, are kept."""
    connection = serving.connect()

    assert connection.request("echo", {"value": 5}, timeout_s=60)["value"] == 5
    assert [message["name"] for message in connection.receive(1.0)] == ["before", "after"]
    connection.close()


def test_request_raises_what_the_aggregator_says(serving):
    """An error in a reply becomes an exception with its text."""
    connection = serving.connect()

    with pytest.raises(TraceMLError, match="no such run"):
        connection.request("finish", {"error": "no such run"}, timeout_s=60)

    connection.close()


def test_clock_offset_is_within_half_a_round_trip(serving):
    """On one host the offset is known exactly; the measured one is as good as its round trip says."""
    connection = serving.connect()

    measured = connection.measure_clock(timeout_s=60)

    assert measured is not None
    before_ns, now_ns, after_ns = time.time_ns(), monotonic_ns(), time.time_ns()
    error_ns = measured.rtt_ns // 2 + 1_000_000
    assert before_ns - now_ns - error_ns <= measured.offset_ns <= after_ns - now_ns + error_ns
    sent = eventually(lambda: [message for message in serving.handler.messages if message["t"] == "clock"])
    assert sent[0]["rtt_ns"] == measured.rtt_ns
    assert abs(measured.shift_ns) <= error_ns
    connection.close()


def test_a_client_measures_the_difference_of_two_clocks(serving, monkeypatch):
    """Its own clock is half an hour behind; it sends nothing, as it has no rows."""
    connection, offset_ns = serving.connect(), 1_800_000_000_000
    monkeypatch.setattr(client, "clock_pair", lambda: (monotonic_ns(), time.time_ns() - offset_ns))

    measured = connection.measure_clock(timeout_s=60, is_sent=False)

    assert measured is not None
    assert abs(measured.shift_ns - offset_ns) < 60_000_000_000
    assert connection.request("any", timeout_s=60) is not None
    assert [message["t"] for message in serving.handler.messages] == ["command"]
    connection.close()


def test_finish_waits_for_the_other_side(serving, monkeypatch):
    """`finish` returns True once the aggregator has said bye too."""
    monkeypatch.setattr("traceml.fail_open._failures", {})  # those of other tests in this process
    assert serving.connect().finish("finished", timeout_s=60)
    assert serving.handler.messages[-1] == {"t": "bye", "reason": "finished"}


def test_sending_never_blocks_and_nothing_is_lost(serving):
    """Bytes that the socket does not take wait in `unsent_bytes` and are sent later, in order."""
    connection = serving.connect()
    serving._loop.call_soon_threadsafe(serving.server.peers.copy().pop().pause, True)
    data = bytes(104 * 2048)
    count = 0
    while not connection.unsent_bytes:
        connection.send_rows("steps", 2048 * count, 2048, data)
        count += 1

    connection.send_rows("steps", 2048 * count, 2048, data)
    serving._loop.call_soon_threadsafe(serving.server.peers.copy().pop().pause, False)
    eventually(lambda: connection.receive(0.05) == [] and connection.acked["steps"] == 2048 * (count + 1))

    assert connection.unsent_bytes == 0
    assert [seq for _, seq, _ in serving.handler.rows_taken] == list(range(0, 2048 * (count + 1), 2048))
    connection.close()


def test_no_aggregator_names_every_remedy():
    """Without an aggregator the error names address, time, and the ways out."""
    port = free_port()

    with pytest.raises(AggregatorUnavailableError) as caught:
        connect("127.0.0.1", port, Hello(), TOKEN, timeout_s=0.3)

    for part in (f"127.0.0.1:{port}", "traceml serve", "local=True", "TRACEML_ENABLED=0", "refused"):
        assert part in str(caught.value)


def test_connect_retries_until_an_aggregator_answers():
    """An aggregator that comes up within the time allowed is found."""
    late = Serving()
    starter = threading.Timer(0.3, late.start)
    starter.start()

    connection = connect("127.0.0.1", late.port, Hello(run="job"), TOKEN, timeout_s=60)

    assert connection.acked == {"steps": 7}
    connection.close()
    starter.join()
    late.close()


def test_a_fork_does_not_wait_for_the_next_try(monkeypatch):
    """As that of a loader which another thread starts while `init` tries to connect."""
    inside = []

    def sleep(_seconds):
        inside.append(threading.get_ident() in fork_gate._inside)
        raise InterruptedError

    monkeypatch.setattr(client.time, "sleep", sleep)
    with fork_gate, pytest.raises(InterruptedError):
        connect("127.0.0.1", free_port(), Hello(), TOKEN, timeout_s=60)

    assert inside == [False]


def test_silent_listener_is_told_from_none():
    """A program that listens and says nothing gives a reason of its own."""
    with (
        FalseServer() as server,
        pytest.raises(AggregatorUnavailableError, match="a program listens there, but sent no challenge"),
    ):
        dial(server.port, timeout_s=0.3)


def test_other_protocol_is_reported():
    """A web server on the port gives an error that says so, not a crash."""
    with (
        FalseServer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as server,
        pytest.raises(AggregatorUnavailableError, match="is announced"),
    ):
        dial(server.port)


def test_other_version_is_refused_on_both_sides(caplog):
    """The client leaves a server of another version and sends the reason."""
    with FalseServer(challenge(v=2)) as server:
        with pytest.raises(AggregatorRefusedError, match="wire version 2"):
            dial(server.port)

        assert "wire version 2" in eventually(lambda: server.heard)[0]["why"]
        assert "wire version 2" in caplog.text


def test_server_without_the_token_is_left(caplog):
    """A server that cannot prove the token gets no rows."""
    with (
        FalseServer(challenge(), encode({"t": "welcome", "v": 1, "mac": b"x" * 32, "acked": {}})) as server,
        pytest.raises(AggregatorRefusedError, match="does not know the token"),
    ):
        dial(server.port)


@pytest.mark.parametrize(
    "nonce", [auth.client_nonce(), b"short", b"n" * 65, "text", None], ids=["ours", "short", "long", "text", "none"]
)
def test_challenge_that_could_be_a_reflection_is_not_answered(nonce):
    """A nonce which a client made is never answered, nor one that is none."""
    with FalseServer(challenge(nonce=nonce)) as server:
        with pytest.raises(AggregatorRefusedError, match="an invalid nonce"):
            dial(server.port)

        assert all(message["t"] == "refused" for message in eventually(lambda: server.heard))


def test_without_a_token_the_error_says_where_to_put_one(serving, monkeypatch, tmp_path):
    """An aggregator of another user is distinguished from a wrong token."""
    monkeypatch.setattr(auth, "_candidates", lambda: [tmp_path / "traceml"])

    with pytest.raises(AggregatorRefusedError, match="TRACEML_TOKEN"):
        dial(serving.port, None)


def test_published_token_is_found(serving, monkeypatch, tmp_path):
    """On one host no token needs to be given."""
    monkeypatch.setattr(auth, "_candidates", lambda: [tmp_path / "traceml"])
    auth.publish("127.0.0.1", serving.port, TOKEN)

    dial(serving.port, None).close()


def test_refusal_that_passes_counts_as_unavailable(serving):
    """A temporary refusal counts as a lost connection."""
    from traceml.transport.server import RefusedError

    serving.handler.refuse = RefusedError("the disk is full", retry=True)
    with pytest.raises(AggregatorUnavailableError, match="the disk is full"):
        serving.connect()

    serving.handler.refuse = RefusedError("unknown table")
    with pytest.raises(AggregatorRefusedError, match="unknown table"):
        serving.connect()


def test_loss_of_the_connection_raises(serving):
    """Receiving raises when the aggregator is gone."""
    connection = serving.connect()
    serving._loop.call_soon_threadsafe(serving.server.peers.copy().pop().abort)

    with pytest.raises(ConnectionError):
        eventually(lambda: connection.receive(0.1))

    connection.close()


def test_all_the_time_allowed_is_used():
    """The last try comes at the end of the time: an aggregator that starts late is still met."""
    port = free_port()
    with pytest.raises(AggregatorUnavailableError) as caught:
        connect("127.0.0.1", port, Hello(run="job"), TOKEN, timeout_s=0.6)

    assert caught.value.waited_s >= 0.6
