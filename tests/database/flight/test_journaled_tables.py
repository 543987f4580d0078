"""Rows that are never evicted: memory and journal together give every one, in order, also after a kill."""

from __future__ import annotations

import errno
import logging
import os
import struct
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER, find_flights
from traceml.database.flight.journal import Journal, journal_path, read_journal
from traceml.database.flight.journaled_tables import JournaledLog, JournaledRing
from traceml.database.flight.postmortem import read_flight


def make_flight(folder: Path, rows: int = 8) -> FlightFile:
    return FlightFile.create(folder / "memory", {"rank": 0}, capacities={"metrics": rows}, runs_dir=folder / "disk")


def ring_of(flight: FlightFile, appended: int) -> JournaledRing:
    for number in range(appended):
        flight.metrics.append(number, number, 0, float(number), 0, 0)

    return flight.metrics


def log_of(flight: FlightFile, name: str = "logged") -> JournaledLog:
    log = flight.log(name)
    assert isinstance(log, JournaledLog)
    return log


def numbers(data: bytes) -> list[int]:
    return [row[0] for row in struct.iter_unpack("@qqqdqq", data)]


def drained(table: JournaledRing | JournaledLog, cursor: int = 0, limit: int = 2048) -> tuple[list[int], bytes]:
    """Take all from a cursor on, as the sender does; return the numbers that came first in each take, and all bytes."""
    firsts, data = [], b""
    while (taken := table.read_from(cursor, limit)).n:
        firsts.append(taken.first)
        data += taken.data
        cursor = taken.first + taken.n

    return firsts, data


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.booleans()), max_size=12))
def test_every_row_is_given_once_whatever_is_acknowledged_when(tmp_path_factory: pytest.TempPathFactory, turns) -> None:
    """Appending, sending and acknowledging in any order: nothing is skipped, nothing comes twice."""
    flight = make_flight(tmp_path_factory.mktemp("flight"))
    ring, sent, given_out = flight.metrics, 0, []
    for appended, taken_rows, is_acked in turns:
        ring_of(flight, appended)
        taken = ring.read_from(sent, taken_rows or 1)
        assert taken.first == sent
        given_out += numbers(taken.data)
        sent += taken.n
        if is_acked:
            ring.acked = sent
            ring.trim()

    given_out += numbers(drained(ring, sent)[1])
    expected = [number for appended, _, _ in turns for number in range(appended)]
    assert given_out == expected
    flight.close(unlink=True)


def test_a_signal_after_room_was_made_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler, which logs too, runs before the interrupted row is written: both are there once."""
    make_room = JournaledRing.make_room

    def interrupted(ring: JournaledRing) -> bool:
        made = make_room(ring)
        monkeypatch.setattr(JournaledRing, "make_room", make_room)
        ring.append(-1, 0, 0, 0.0, 0, 0)
        return made

    monkeypatch.setattr(JournaledRing, "make_room", interrupted)
    ring = ring_of(make_flight(tmp_path), 20)

    data = drained(ring)[1]
    assert sorted(numbers(data)) == [-1, *range(20)]


def test_maps_go_to_the_journal_when_memory_is_full(tmp_path: Path) -> None:
    """Large and small ones keep their order, one larger than all of memory too; the files go when all is stored."""
    flight = make_flight(tmp_path)
    log = log_of(flight)
    rows = [{"n": n, "filler": "x" * (400_000 if n % 50 == 7 else 3_000)} for n in range(300)]
    for row in rows:
        assert log.append(row)

    assert [row["n"] for row in msgpack.Unpacker(_file(drained(log)[1]), max_buffer_size=0)] == list(range(300))
    assert log.read_from(299).n == 1
    journal = journal_path(flight.journal_stems[0], "logged")
    assert journal.stat().st_size > 1_000_000
    log.acked = log.appended
    log.trim()
    assert journal.stat().st_size == 0
    flight.close(unlink=True)
    assert list((tmp_path / "disk" / FALLBACK_FOLDER).iterdir()) == []


def test_names_can_be_sent_again_to_a_new_store(tmp_path: Path) -> None:
    """They are kept when they are stored already: each of 20,000 has one number, from first to last."""
    flight = make_flight(tmp_path)
    ids = [flight.names.id_of(f"name {number}") for number in range(20_000)]
    log = log_of(flight, "names")
    log.acked = log.appended
    log.trim()

    assert len(set(ids)) == len(flight.names) == 20_000
    assert flight.names.id_of("name 77") == ids[77]
    reported = {row["id"]: row["name"] for row in msgpack.Unpacker(_file(drained(log)[1]), max_buffer_size=0)}
    assert reported == {number: f"name {index}" for index, number in enumerate(ids)}
    flight.close(unlink=True)


def test_names_are_on_disk_before_the_rows_that_use_them(tmp_path: Path) -> None:
    """Whenever memory is lost, each row in the journal has its name there, and each name is there once."""
    flight = make_flight(tmp_path)
    for number in range(200):
        name_id = flight.names.id_of(f"name {number // 3}")
        flight.metrics.append(name_id, number, 0, 0.0, 0, 0)
        in_journal = [
            row
            for taken in read_journal(journal_path(flight.journal_stems[0], "names"))
            for row in msgpack.Unpacker(_file(taken.data), max_buffer_size=0)
        ]
        assert [row["id"] for row in in_journal] == list(range(len(in_journal)))
        rows = b"".join(taken.data for taken in read_journal(journal_path(flight.journal_stems[0], "metrics")))
        assert all(name_id < len(in_journal) for name_id in numbers(rows))

    flight.close(unlink=False)
    assert flight.path is not None
    image = read_flight(flight.path, tmp_path / "disk")
    assert [row["name"] for row in image.all_maps("names")] == [f"name {number}" for number in range(67)]
    image.unlink()


def test_a_journal_alone_tells_whose_it_is(tmp_path: Path) -> None:
    """Without the file in memory, rows and later facts about the writer are read from the disk; all of it goes."""
    flight = make_flight(tmp_path)
    ring_of(flight, 100)
    flight.update_identity(run_dir="/runs/a")
    flight.beat(7)
    flight.close(unlink=False)
    assert flight.path is not None
    flight.path.unlink()

    (claim,) = find_flights(tmp_path / "disk" / FALLBACK_FOLDER)
    image = read_flight(claim)

    assert (image.identity["rank"], image.identity["run_dir"]) == (0, "/runs/a")
    assert image.tables == ["metrics"]
    assert image.holds_user_rows
    assert image.open_step is None
    rows = numbers(b"".join(taken.data for taken in image.read_all("metrics")))
    assert rows == list(range(image.counters("metrics").appended))
    assert len(rows) > 90
    image.unlink()
    assert list((tmp_path / "disk" / FALLBACK_FOLDER).iterdir()) == []


def test_a_dead_process_leaves_memory_and_journal(tmp_path: Path) -> None:
    """A reader of the flight file gets the journal's rows first, none twice, and no truncated record."""
    flight = make_flight(tmp_path)
    ring_of(flight, 100)
    for number in range(400):
        log_of(flight).append({"n": number, "filler": "x" * 2_000})

    flight.close(unlink=False)
    assert flight.path is not None
    journal = journal_path(flight.journal_stems[0], "metrics")
    with journal.open("ab") as file:
        file.write(journal.read_bytes()[:50])  # a record that the end cut off

    image = read_flight(flight.path, tmp_path / "disk")
    assert image.holds_user_rows
    for start in (0, 3, 50, 97, 100):
        takes = list(image.read_all("metrics", start))
        rows = {taken.first + index: n for taken in takes for index, n in enumerate(numbers(taken.data))}
        assert {number: n for number, n in rows.items() if number >= start} == {n: n for n in range(start, 100)}

    maps = b"".join(taken.data for taken in image.read_all("logged"))
    assert [row["n"] for row in msgpack.Unpacker(_file(maps), max_buffer_size=0)] == list(range(400))
    image.unlink()
    assert list((tmp_path / "disk" / FALLBACK_FOLDER).iterdir()) == list((tmp_path / "memory").iterdir()) == []


def test_a_full_disk_loses_the_oldest_rows_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest stay in memory; what is lost shows as a gap; when there is space again, nothing more is lost."""
    flight = make_flight(tmp_path, 64)

    def full(descriptor: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with caplog.at_level(logging.WARNING, "traceml"), monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        ring_of(flight, 1000)

    assert [record.message.count("No space left") for record in caplog.records] == [1]
    first = flight.metrics.read_from(0).first
    assert 1000 - 64 < first < 1000 - 16
    ring_of(flight, 500)
    firsts, data = drained(flight.metrics, first)
    assert len(numbers(data)) == 1500 - firsts[0]
    assert first <= firsts[0] < 1000
    flight.close(unlink=True)


def test_a_journal_goes_where_it_can(tmp_path: Path) -> None:
    """The second place is used where the first cannot be written; without any the error says so."""
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "a.journal", tmp_path / "b.journal")
    journal.append(0, 1, b"row")
    assert journal.path == tmp_path / "b.journal"
    assert [taken.data for taken in read_journal(journal.path)] == [b"row"]
    journal.close(unlink=True)
    assert list(read_journal(journal.path)) == []

    with pytest.raises(OSError, match="it has no folder"):
        Journal().append(0, 1, b"row")


def test_a_journal_with_a_flipped_bit_ends_there(tmp_path: Path) -> None:
    """Records before the damage are read, none after it."""
    path = tmp_path / "a.journal"
    journal = Journal(path)
    for number in range(10):
        journal.append(number, 1, b"%04d" % number)

    journal.close(unlink=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    assert [taken.data for taken in read_journal(path)] == [b"%04d" % number for number in range(5)]


def _file(data: bytes):
    import io

    return io.BytesIO(data)


def test_a_journal_with_a_flipped_number_ends_there(tmp_path: Path) -> None:
    """The checksum is of the numbers of rows, too: rows never get another number."""
    path = tmp_path / "a.journal"
    journal = Journal(path)
    for number in range(3):
        journal.append(number, 1, b"row")
    journal.close(unlink=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 + 4] ^= 4
    path.write_bytes(data)

    assert [taken.first for taken in read_journal(path)] == [0]
