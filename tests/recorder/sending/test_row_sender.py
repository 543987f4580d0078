"""The sender against a made-up connection: what goes out when, what is counted, where it resumes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from traceml.database.flight.flight import FlightFile
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.recorder.sending import row_sender as module
from traceml.recorder.sending.row_sender import RowSender
from traceml.recorder.sending.send_cursor import Losses
from traceml.transport.client import ClockOffset
from traceml.transport.client_handshake import TemporaryRefusalError
from traceml.transport.framing import decode_log


class Wire:
    """A connection that keeps what it is given; `stuck` takes nothing more, `broken` raises."""

    def __init__(self, acked: dict[str, int] | None = None) -> None:
        self.acked = acked or {}
        self.welcome: dict[str, Any] = {}
        self.sent: list[tuple[str, int, int, bytes]] = []
        self.messages: list[dict[str, Any]] = []
        self.inbox: list[dict[str, Any]] = []
        self.unsent_bytes = 0
        self.bytes_sent = 0
        self.stuck_after: int | None = None
        self.broken = False
        self.closed: str | None = None
        self.bye: str | None = None

    def send_rows(self, table: str, seq: int, n: int, data: bytes) -> int:
        if self.broken:
            raise ConnectionResetError("gone")

        self.sent.append((table, seq, n, data))
        self.bytes_sent += len(data)
        if self.stuck_after is not None and len(self.sent) >= self.stuck_after:
            self.unsent_bytes = 1

        return len(data)

    def send(self, message: dict[str, Any]) -> int:
        self.messages.append(message)
        return 1

    def receive(self, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        if self.broken:
            raise ConnectionResetError("gone")

        messages, self.inbox = self.inbox, []
        return messages

    def measure_clock(self) -> ClockOffset | None:
        return ClockOffset(5, 1)

    def finish(self, reason: str, *, timeout_s: float) -> bool:
        self.bye = reason
        for table, seq, n, _ in self.sent:
            self.acked[table] = seq + n

        return True

    def close(self, reason: str | None = None) -> None:
        self.closed = reason or "closed"

    def rows_of(self, table: str) -> list[tuple[int, int]]:
        """(first row, rows) of each frame of a table."""
        return [(seq, n) for name, seq, n, _ in self.sent if name == table]


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[FlightFile]:
    """A flight file with a ring of 4,096 steps."""
    made = FlightFile.create(tmp_path / "flights", {}, capacities={"steps": 4096})
    yield made
    made.close(unlink=True)


def add_steps(flight: FlightFile, count: int) -> None:
    ring = flight.ring("steps")
    append = ring.appender("step")
    for _ in range(count):
        append(ring.appended)


def make(flight: FlightFile, *wires: Wire | Exception, late: bool = True, **options: Any) -> RowSender:
    """A sender whose dials give these, one after another; `late`: past the first seconds, in which all goes at once."""
    waiting = list(wires)

    def dial(_timeout_s: float) -> Any:
        next_one = waiting.pop(0)
        if isinstance(next_one, Exception):
            raise next_one

        return next_one

    made = RowSender(flight, dial, **options)
    made._started_ns = made._flushed_ns = made._started_ns - (10**10 if late else 0)
    return made


def settle(sender: RowSender) -> None:
    """Connect and send what is there, so that the flush interval begins."""
    sender.pump(flush=True)


def test_frames_wait_for_64_rows_or_the_interval(flight: FlightFile) -> None:
    """Fewer rows wait; the 64th sends them; after the interval one is enough."""
    wire = Wire()
    sender = make(flight, wire, flush_interval_s=1000.0)
    settle(sender)

    add_steps(flight, 63)
    sender.pump()
    assert wire.rows_of("steps") == []

    add_steps(flight, 1)
    sender.pump()
    assert wire.rows_of("steps") == [(0, 64)]

    add_steps(flight, 1)
    sender.pump()
    assert wire.rows_of("steps") == [(0, 64)]
    sender._flushed_ns -= 10**13
    sender.pump()
    assert wire.rows_of("steps") == [(0, 64), (64, 1)]


def test_a_clock_that_could_not_be_read_is_asked_for_soon(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregator may have no core for half a second; once it has answered, a minute passes. At any time of day."""
    now_ns = 0
    monkeypatch.setattr(module, "monotonic_ns", lambda: now_ns)
    wire, asked, answers = Wire(), list[int](), [None, None, ClockOffset(5, 1), ClockOffset(6, 1)]

    def measure() -> ClockOffset | None:
        asked.append(now_ns // 10**9)
        return answers.pop(0)

    wire.measure_clock = measure  # type: ignore[method-assign]
    sender = make(flight, wire)
    for _ in range(80):
        wire.inbox.append({"t": "pong"})
        sender.pump()
        now_ns += 10**9

    assert asked == [0, 5, 10, 70]
    assert sender.clock == ClockOffset(6, 1)


def test_the_first_rows_go_at_once(flight: FlightFile) -> None:
    """Somebody waits for a sign of life: in the first seconds no row waits."""
    wire = Wire()
    sender = make(flight, wire, late=False, flush_interval_s=1000.0)
    sender._started_ns += 10**13  # they last, however long this takes

    add_steps(flight, 1)
    sender.pump()
    add_steps(flight, 1)
    sender.pump()

    assert wire.rows_of("steps") == [(0, 1), (1, 1)]


def test_slices_of_512_rows(flight: FlightFile) -> None:
    """A backlog goes out in slices that hold the GIL for microseconds only."""
    wire = Wire()
    sender = make(flight, wire)
    add_steps(flight, 1000)

    sender.pump()

    assert wire.rows_of("steps") == [(0, 512), (512, 488)]


def test_names_go_before_the_rows_that_use_them(flight: FlightFile) -> None:
    """A name that came after the last row's end was read still travels before that row."""
    wire = Wire()
    sender = make(flight, wire, flush_interval_s=1000.0)
    settle(sender)
    flight.log("names").append({"id": 0, "name": "augment"})
    for step in range(64):
        flight.ring("user_phases").append(step, 0, 5, 1)

    sender.pump()

    assert [table for table, *_ in wire.sent] == ["names", "user_phases"]
    assert decode_log(wire.sent[0][3]) == [{"id": 0, "name": "augment"}]


def test_overwritten_rows_are_counted_exactly(flight: FlightFile) -> None:
    """Rows that the ring overwrote are lost; sent and lost rows add up to the appended ones."""
    wire = Wire()
    sender = make(flight, wire)
    add_steps(flight, 10_000)

    sender.pump()

    sent = sum(n for _, n in wire.rows_of("steps"))
    assert sent == 4095
    assert sender.rows_lost == 10_000 - sent == flight.ring("steps").dropped
    first, _ = wire.rows_of("steps")[0]
    assert first == 10_000 - sent


def test_losses_count_no_row_twice() -> None:
    """Ranges that overlap, because a welcome asked for less than was acknowledged, are one range."""
    losses = Losses()
    losses.add(100, 200)
    losses.add(50, 250)
    losses.add(300, 310)
    losses.add(310, 320)

    assert losses.rows == 200 + 20


def test_many_losses_stay_exact() -> None:
    """Also when there are more ranges than are kept apart."""
    losses = Losses()
    for start in range(0, 30_000, 10):
        losses.add(start, start + 3)

    assert losses.rows == 3 * 3000


def test_it_resumes_where_the_welcome_says(flight: FlightFile) -> None:
    """Also below what was acknowledged before: the aggregator may have lost its last commits."""
    first, second = Wire(), Wire({"steps": 40})
    sender = make(flight, first, second)
    add_steps(flight, 100)
    sender.pump()
    first.acked["steps"] = 100
    sender.pump()
    assert flight.ring("steps").acked == 100

    first.broken = True
    sender.pump()
    sender._next_try_ns = 0
    sender.pump()

    assert second.rows_of("steps") == [(40, 60)]
    assert sender.connections == 2
    assert sender.rows_lost == 0


def test_a_welcome_beyond_what_was_appended_skips_nothing(flight: FlightFile) -> None:
    """Rows appended later are sent, also after a wrong welcome."""
    wire = Wire({"steps": 1000})
    sender = make(flight, wire)
    add_steps(flight, 5)
    sender.pump()
    add_steps(flight, 5)
    sender.pump(flush=True)

    assert wire.rows_of("steps") == [(5, 5)]


def test_rows_stay_in_the_ring_while_the_peer_is_behind(flight: FlightFile) -> None:
    """Nothing is sent behind a frame that the socket has not taken; the rows go out once it has."""
    wire = Wire()
    wire.stuck_after = 1
    sender = make(flight, wire)
    add_steps(flight, 700)

    sender.pump()
    sender.pump()
    assert wire.rows_of("steps") == [(0, 512)]

    wire.unsent_bytes, wire.stuck_after = 0, None
    sender.pump()
    assert wire.rows_of("steps") == [(0, 512), (512, 188)]


def test_a_missing_aggregator_is_tried_again_with_growing_pauses(
    flight: FlightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between tries nothing is dialled; each pause may be twice the last, with jitter."""
    now_ns = 10**15
    monkeypatch.setattr(module, "monotonic_ns", lambda: now_ns)
    missing = AggregatorUnavailableError("h", 1, 0.1, "refused")
    sender = make(flight, missing, missing, Wire())
    pauses = []
    for _ in range(2):
        sender.pump()
        pauses.append(sender._next_try_ns - now_ns)
        now_ns = sender._next_try_ns - 1
        sender.pump()  # too early: does not dial
        now_ns += 1

    sender.pump()

    assert sender.connected
    assert 0.1e9 <= pauses[0] <= 0.2e9
    assert 0.2e9 <= pauses[1] <= 0.4e9


def test_a_refusal_is_said_once(flight: FlightFile, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong token will not get better by asking fast."""
    refused = AggregatorRefusedError("h", 1, "wrong token")
    sender = make(flight, refused, refused)

    with caplog.at_level(logging.WARNING, "traceml"):
        sender.pump()
        assert sender._next_try_ns - module.monotonic_ns() > 20e9
        sender._next_try_ns = 0
        sender.pump()

    assert [record.getMessage() for record in caplog.records].count(
        "the traceml aggregator at h:1 refused the connection: wrong token; "
        "the last 4,096 steps and all logged values are kept, and the connection is retried every minute"
    ) == 1


def test_losing_the_aggregator_is_said_once(flight: FlightFile, caplog: pytest.LogCaptureFixture) -> None:
    """The second outage is no news."""
    wires = [Wire(), Wire()]
    sender = make(flight, *wires)
    with caplog.at_level(logging.WARNING, "traceml"):
        for wire in wires:
            sender._next_try_ns = 0
            sender.pump()
            wire.broken = True
            sender.pump()

    assert len([r for r in caplog.records if "lost the aggregator" in r.getMessage()]) == 1
    assert all(wire.closed for wire in wires)


def test_a_silent_connection_is_given_up(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 30 s in which rows wait for an acknowledgement, then after 60; without such rows it may be silent."""
    now_ns = 10**15
    monkeypatch.setattr(module, "monotonic_ns", lambda: now_ns)
    wires = [Wire(), Wire(), Wire()]
    sender = make(flight, *wires)
    settle(sender)
    ended = []
    for second in range(300):
        now_ns += 10**9
        if second == 100:
            add_steps(flight, 1)

        sender.pump()
        ended += [second] * (sum(wire.closed is not None for wire in wires) - len(ended))

    assert ended == [131, 193]
    assert sender.connections == 3
    assert [wire.rows_of("steps") for wire in wires] == [[(0, 1)]] * 3  # sent again over each


def test_an_aggregator_that_cannot_store_is_not_lost(
    flight: FlightFile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so every 10 s, on a full disk: the reason is told once, and the connection is kept."""
    now_ns = 10**15
    monkeypatch.setattr(module, "monotonic_ns", lambda: now_ns)
    wire = Wire()
    sender = make(flight, wire)
    add_steps(flight, 1)
    with caplog.at_level(logging.WARNING, "traceml"):
        for second in range(100):
            now_ns += 10**9
            wire.inbox = [{"t": "stalled", "why": "the disk is full"}] if second % 10 == 0 else []
            sender.pump()

    assert wire.closed is None
    assert [record.getMessage() for record in caplog.records] == [
        (
            "the aggregator cannot store rows now (the disk is full); training continues, and the last 4,096 steps and "
            "all logged values are kept until it can"
        )
    ]


def test_a_temporary_refusal_is_no_lost_aggregator(flight: FlightFile, caplog: pytest.LogCaptureFixture) -> None:
    """A logged file that the aggregator cannot write: it lives, and may take it later."""
    wire = Wire()
    sender = make(flight, wire)
    settle(sender)
    add_steps(flight, 100)
    refusal = TemporaryRefusalError("a file cannot be written: No space left on device")
    wire.receive = _raising(refusal)  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "traceml"):
        sender.pump()

    assert [record.getMessage() for record in caplog.records] == [
        (
            "the aggregator cannot store rows now (a file cannot be written: No space left on device); training "
            "continues, the last 4,096 steps and all logged values are kept, and the connection is retried"
        )
    ]
    assert wire.closed


def _raising(error: Exception) -> Any:
    def raises(*_: Any) -> Any:
        raise error

    return raises


def test_commands_are_answered(flight: FlightFile) -> None:
    """Known ones with their result, failing and unknown ones with an error that says which are known."""
    wire = Wire()
    sender = make(flight, wire, commands={"add": lambda args: args["a"] + 1, "fail": lambda _args: 1 // 0})
    sender.pump()
    wire.inbox = [
        {"t": "command", "id": 1, "name": "add", "args": {"a": 2}},
        {"t": "command", "id": 2, "name": "fail"},
        {"t": "command", "id": 3, "name": "dance"},
        {"t": "something else"},
    ]

    sender.pump()

    by_id = {message["id"]: message for message in wire.messages}
    assert by_id[1]["result"] == 3
    assert by_id[2]["error"].startswith("ZeroDivisionError")
    assert "knows no command 'dance'; it knows add, fail" in by_id[3]["error"]


def test_samples_of_a_large_job_are_sent_less_often(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The welcome says how often; steps are sent as before, and all at a flush."""
    now_ns = 10**15
    monkeypatch.setattr(module, "monotonic_ns", lambda: now_ns)
    monkeypatch.setattr(module, "random_share", lambda: 0.5)
    wire = Wire()
    wire.welcome["sample_interval_s"] = 40.0
    sender = make(flight, wire, flush_interval_s=1.0)
    sample = flight.ring("process").appender("t_ns")
    seconds = []
    for second in range(70):
        add_steps(flight, 1)
        sample(second)
        before = len(wire.rows_of("process"))
        wire.inbox.append({"t": "pong"})
        sender.pump()
        seconds += [second] * (len(wire.rows_of("process")) - before)
        now_ns += 10**9

    assert [n for _, n in wire.rows_of("steps")] == [1] * 70
    assert seconds == [20, 60]
    sender.pump(flush=True)
    assert sum(n for _, n in wire.rows_of("process")) == 70


def test_finish_sends_everything_and_says_bye(flight: FlightFile) -> None:
    """The bye follows the last row, with its reason."""
    wire = Wire()
    sender = make(flight, wire, flush_interval_s=1000.0)
    settle(sender)
    add_steps(flight, 3)

    stored = sender.finish("finished", timeout_s=60, keep_trying=False)

    assert stored
    assert wire.rows_of("steps") == [(0, 3)]
    assert wire.bye == "finished"
    assert not sender.connected


def test_finish_tries_a_broken_connection_again(flight: FlightFile, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that were on their way when the aggregator died go to the next one."""
    first, second = Wire(), Wire()
    sender = make(flight, first, second, is_ending=lambda: True)
    settle(sender)
    add_steps(flight, 3)
    first.broken = True

    with caplog.at_level(logging.WARNING, "traceml"):
        assert sender.finish("finished", timeout_s=60, keep_trying=True)

    assert second.rows_of("steps") == [(0, 3)]
    assert not caplog.records  # all is stored, and no training continues


def test_finish_without_an_aggregator_is_one_try(flight: FlightFile) -> None:
    """Without an aggregator and `keep_trying` the end of the process does not wait."""
    sender = make(flight, AggregatorUnavailableError("h", 1, 0.1, "refused"))
    add_steps(flight, 3)

    assert not sender.finish("finished", timeout_s=60, keep_trying=False)


def test_pauses_shorten_as_the_ring_fills(flight: FlightFile) -> None:
    """Between two wakes no more than about a quarter of the ring may come."""
    sender = make(flight, Wire())
    sender.pump()
    assert sender.pause_s(0.25) == 0.25

    add_steps(flight, 4096)
    assert sender.pause_s(0.25) == pytest.approx(0.25 / 4)
