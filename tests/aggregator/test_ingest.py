from __future__ import annotations

import msgpack
import pytest

from tests.aggregator.conftest import step_rows
from tests.aggregator.test_live_verdict import stream_of
from traceml.aggregator.ingest import Ingest
from traceml.aggregator.live_rows import LiveRows
from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.errors import ProtocolError, StoreError
from traceml.run_folder import STORE_NAME
from traceml.transport.framing import Decoder
from traceml.transport.server import RefusedError


class Listening:
    """A peer that keeps the acks it gets."""

    def __init__(self) -> None:
        self.acks: list[tuple[str, int]] = []

    def write(self, frames: bytes) -> None:
        self.acks += [(message["table"], message["seq"]) for message in Decoder().feed(frames)]


class Way:
    """One stream's way into a store."""

    def __init__(self, folder) -> None:
        self.path = folder / STORE_NAME
        self.store = StoreWriter(self.path)
        self.held: list[str] = []
        self.ingest = Ingest(self.store, LiveRows(1), self.held.append)
        self.stream = stream_of(0)
        assert self.store.stream(StreamIdentity(0, 0, "host", 100, 1, "r0")) == self.stream.id
        self.peer = Listening()
        self.stream.connect(self.peer)

    def take(self, start: int, count: int) -> None:
        self.ingest.take(self.stream, "steps", start, count, step_rows(start, count))

    def steps(self) -> list[int]:
        with StoreReader(self.path) as reader:
            return reader.rows("steps")["step"].tolist()


@pytest.fixture
def way(tmp_path):
    made = Way(tmp_path)
    yield made
    made.store.close()


def test_one_ack_per_table_after_the_commit(way):
    """Frames of a tick are acknowledged together, once they are stored."""
    way.take(0, 10)
    way.take(10, 10)
    way.ingest.take(way.stream, "names", 0, 1, msgpack.packb({"id": 0, "name": "a"}))
    assert way.peer.acks == []

    assert way.ingest.commit()

    assert way.peer.acks == [("steps", 20), ("names", 1)]
    assert way.steps() == [*range(20)]


@pytest.mark.parametrize("again", [(0, 10), (5, 10), (0, 20), (9, 1)])
def test_repeats_are_cut_and_acknowledged(way, again):
    """However a resent frame overlaps with what is stored, each row is there once; the rank learns how far it is."""
    way.take(0, 10)
    way.ingest.commit()

    way.take(*again)
    way.ingest.commit()

    end = max(10, sum(again))
    assert way.steps() == [*range(end)]
    assert way.peer.acks[-1] == ("steps", end)
    assert way.ingest.statistics().repeated == 10 - again[0]


def test_repeats_of_a_log_are_cut(way):
    """Rows of a log have no fixed size; also of them, only what is new is stored."""
    rows = [msgpack.packb({"id": number, "name": f"n{number}"}) for number in range(4)]
    way.ingest.take(way.stream, "names", 0, 3, b"".join(rows[:3]))

    way.ingest.take(way.stream, "names", 1, 3, b"".join(rows[1:]))
    way.ingest.commit()

    with StoreReader(way.path) as reader:
        assert [name["id"] for _, name in reader.log_rows("names")] == [0, 1, 2, 3]


def test_failed_commit_keeps_everything_and_holds_the_ranks_back(way, monkeypatch):
    """Nothing is acknowledged that is not stored; the next commit that works stores all, in order."""
    commit = way.store.commit

    def full() -> None:
        raise StoreError("database or disk is full")

    monkeypatch.setattr(way.store, "commit", full)
    way.take(0, 10)
    assert not way.ingest.commit()
    assert way.held == ["database or disk is full"]
    assert way.peer.acks == []

    way.take(10, 10)
    monkeypatch.setattr(way.store, "commit", commit)
    assert not way.ingest.commit()  # it waits a second between two tries
    assert way.ingest.commit(force=True)

    assert way.held == ["database or disk is full", ""]
    assert way.steps() == [*range(20)]
    assert way.ingest.statistics().failed_commits == 1


def test_stream_without_connection_is_not_acknowledged(way):
    """Rows from a flight file are stored; there is no peer to acknowledge them to."""
    way.stream.disconnect()
    way.take(0, 5)

    assert way.ingest.commit()

    assert way.peer.acks == []
    assert way.steps() == [*range(5)]


@pytest.mark.parametrize(
    ("table", "seq", "n", "data", "error"),
    [
        ("nothing", 0, 1, b"", RefusedError),
        ({}, 0, 1, b"", RefusedError),
        ("steps", 0, 1, bytes(STEPS.row_bytes - 1), ProtocolError),
        ("steps", 2**63, 1, bytes(STEPS.row_bytes), ProtocolError),
        ("steps", 0.0, 1, bytes(STEPS.row_bytes), ProtocolError),
        ("names", 0, 1, b"\x01", ProtocolError),
        ("names", 0, 2, msgpack.packb({}), ProtocolError),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(way, table, seq, n, data, error):
    """A frame that contradicts itself changes nothing."""
    with pytest.raises(error):
        way.ingest.take(way.stream, table, seq, n, data)

    assert not way.ingest.waiting
    assert way.stream.next == {}


@pytest.mark.parametrize(
    ("table", "row", "named"),
    [
        ("names", {"id": 1}, "'name'"),
        ("names", {"id": "1", "name": "a"}, "'id'"),
        ("info", {"kind": "git", "t_ns": "now"}, "'t_ns'"),
        ("logged", {"kind": 5}, "'kind'"),
        ("logged", {"kind": "experiment", "experiment": [1]}, "'experiment'"),
        ("logged", {"kind": "experiment", "backends": 5}, "'backends'"),
        ("logged", {"kind": "params", "params": [1]}, "'params'"),
    ],
)
def test_a_row_that_no_reader_understands_is_refused(way, table, row, named):
    """It was stored, and the run's report and `traceml sync` of all runs ended with a traceback."""
    with pytest.raises(ProtocolError, match=f"{named} of a row of '{table}' is missing or of a wrong type"):
        way.ingest.take(way.stream, table, 0, 1, msgpack.packb(row))

    assert table not in way.stream.next


def test_rows_without_optional_fields_are_taken(way):
    row = {"kind": "tags", "t_ns": 1, "step": None, "tags": ["a"]}
    way.ingest.take(way.stream, "logged", 0, 1, msgpack.packb(row))

    assert way.stream.next["logged"] == 1


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"kind": "loader", "dataset": "Rows", "num_workers": [2], "length": 8}, "num_workers"),
        ({"kind": "exit", "code": 1, "at_s": float("nan"), "line": None}, "at_s"),
        ({"kind": "growth", "grown": 5, "step": 3}, "grown"),
    ],
)
def test_a_fact_that_no_reader_understands_is_left_out(way, caplog, row, wrong):
    """One such value made the report of the run fail; a loader of the user's may have it by its own attributes."""
    way.ingest.take(way.stream, "info", 0, 2, msgpack.packb(row) + msgpack.packb({"kind": "rpc"}))
    way.ingest.commit()

    with StoreReader(way.path) as reader:
        stored = [each for _, each in reader.log_rows("info")]
    assert stored == [{name: value for name, value in row.items() if name != wrong}, {"kind": "rpc"}]
    assert f"facts of a wrong type, which are left out: {wrong}=" in caplog.text
