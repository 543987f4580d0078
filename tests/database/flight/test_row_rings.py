"""Rings and logs: exact windows, exact counts."""

from __future__ import annotations

import io
import mmap
import struct
import threading

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from traceml.database.flight.row_rings import MAX_MAP_BYTES, ByteLog, Ring, pack_map
from traceml.database.schema import INFO, USER_PHASES
from traceml.transport.framing import MAX_FRAME_BYTES, rows_frame


def make_ring(capacity: int = 8) -> Ring:
    memory = mmap.mmap(-1, 4096 + capacity * USER_PHASES.row_bytes)
    return Ring(USER_PHASES, memory, 4096, capacity, memoryview(memory)[:4096].cast("q"), 0)


def make_log(capacity_bytes: int = 512) -> ByteLog:
    memory = mmap.mmap(-1, 4096 + capacity_bytes)
    return ByteLog(INFO, memory, 4096, capacity_bytes, memoryview(memory)[:4096].cast("q"), 0)


def fill(ring: Ring, rows: int) -> None:
    for _ in range(rows):
        n = ring.appended
        ring.append(n, n + 1, n + 2, n + 3)


def numbers(data: bytes) -> list[int]:
    return [row[0] for row in struct.iter_unpack("@4q", data)]


def test_reads_what_was_appended() -> None:
    """A ring that has not wrapped gives every row, in order."""
    ring = make_ring()

    fill(ring, 5)

    assert (ring.appended, ring.oldest()) == (5, 0)
    assert list(struct.iter_unpack("@4q", ring.read_from(1, 2).data)) == [(1, 2, 3, 4), (2, 3, 4, 5)]


def test_window_is_one_row_less_than_the_capacity_once_wrapped() -> None:
    """The slot that is written next is not readable: its row may be half overwritten."""
    ring = make_ring(8)

    fill(ring, 8)

    assert ring.oldest() == 1
    for cursor in (0, 1):
        assert ring.read_from(cursor)[:2] == (1, 7)
        assert numbers(ring.read_from(cursor).data) == list(range(1, 8))


def test_gives_no_rows_that_do_not_exist() -> None:
    """Rows that were not appended are left out, and not zeros."""
    ring = make_ring()
    fill(ring, 3)

    assert numbers(ring.read_from(0, 4).data) == [0, 1, 2]
    assert ring.read_from(3) == (3, 0, b"")


@settings(deadline=None)
@given(capacity=st.sampled_from([2, 4, 16]), appends=st.lists(st.integers(1, 40), max_size=8), limit=st.integers(1, 20))
def test_taken_rows_and_overwritten_rows_are_all_rows(capacity: int, appends: list[int], limit: int) -> None:
    """Following with a cursor, each row is either taken once or known to be overwritten."""
    ring = make_ring(capacity)
    cursor = lost = 0
    seen: list[int] = []

    for rows in appends:
        fill(ring, rows)
        expected_loss = max(0, ring.oldest() - cursor)
        taken = ring.read_from(cursor, limit)
        assert taken.first - cursor == expected_loss
        assert numbers(taken.data) == list(range(taken.first, taken.first + taken.n))
        lost += taken.first - cursor
        seen += numbers(taken.data)
        cursor = taken.first + taken.n

    assert len(seen) + lost + (ring.appended - cursor) == ring.appended
    assert seen == sorted(set(seen))


def test_take_gives_nothing_when_nothing_is_new() -> None:
    """A cursor at the end stays where it is."""
    ring = make_ring()
    fill(ring, 3)

    assert ring.read_from(3) == (3, 0, b"")


def test_never_gives_a_torn_row_to_a_thread_that_reads_while_another_writes() -> None:
    """Rows taken while the ring is overwritten at full speed are whole, and losses are exact."""
    ring = make_ring(64)
    total = 40_000
    writer = threading.Thread(target=fill, args=(ring, total))
    cursor = lost = taken_rows = 0

    writer.start()
    while cursor < total:
        taken = ring.read_from(cursor, 50)
        lost += taken.first - cursor
        for row in struct.iter_unpack("@4q", taken.data):
            assert row == (row[0], row[0] + 1, row[0] + 2, row[0] + 3)
        assert numbers(taken.data) == list(range(taken.first, taken.first + taken.n))
        taken_rows += taken.n
        cursor = taken.first + taken.n

    writer.join()
    assert taken_rows + lost == total


def test_counters_of_the_recorder_are_kept_beside() -> None:
    """sent, acked and dropped do not disturb the append counter."""
    ring = make_ring()
    fill(ring, 2)

    ring.sent, ring.acked, ring.dropped = 2, 1, 7

    assert (ring.appended, ring.sent, ring.acked, ring.dropped) == (2, 2, 1, 7)


def test_log_gives_back_its_maps() -> None:
    """A log's maps come back as they were, from any number on."""
    log = make_log()
    rows = [{"id": i, "name": f"phase {i}"} for i in range(5)]

    assert all(log.append(row) for row in rows)

    assert log.appended == 5
    unpacker = msgpack.Unpacker()
    unpacker.feed(log.read(2, 5))
    assert list(unpacker) == rows[2:]
    assert log.read_from(4) == (4, 1, msgpack.packb(rows[4]))
    assert log.read_from(5) == (5, 0, b"")


def test_full_log_refuses_and_counts() -> None:
    """Maps that do not fit are refused and counted; the last eighth is for urgent ones."""
    log = make_log(256)
    kept = 0
    while log.append({"kind": "note", "text": "x" * 20}):
        kept += 1

    assert not log.append({"kind": "note", "text": "x" * 20})
    assert log.append({"kind": "exit", "signal": 9}, urgent=True)
    assert not log.append({"kind": "exit", "text": "x" * 300}, urgent=True)
    assert (log.appended, log.dropped) == (kept + 1, 3)


def test_a_map_that_no_frame_can_hold_is_refused() -> None:
    """It would never be sent, nor what comes after it."""
    log = make_log(4 * MAX_MAP_BYTES)
    largest = {"text": "x" * (MAX_MAP_BYTES - len(pack_map({"text": "x" * MAX_MAP_BYTES})) + MAX_MAP_BYTES)}
    assert len(pack_map(largest)) == MAX_MAP_BYTES

    assert log.append(largest)
    assert not log.append({"text": largest["text"] + "x"})
    assert (log.appended, log.dropped) == (1, 1)
    assert len(rows_frame(INFO.name, 0, 1, log.read(0, 1))) < MAX_FRAME_BYTES


def test_full_log_starts_empty_when_all_is_stored() -> None:
    """A run of weeks has more facts than the log has room; those that the store has make room for new ones."""
    log = make_log(256)
    row = {"kind": "snapshot", "text": "x" * 40}
    for number in range(50):
        assert log.append(row | {"id": number})
        log.acked = log.appended

    assert (log.appended, log.dropped) == (50, 0)
    assert log.unstored_bytes == 0
    first = log.base
    assert 0 < first < 50
    taken = log.read_from(0)
    assert (taken.first, taken.n) == (first, 50 - first)
    assert [found["id"] for found in msgpack.Unpacker(io.BytesIO(taken.data))] == list(range(first, 50))

    log.append(row)
    assert log.unstored_bytes == len(msgpack.packb(row))


def test_log_takes_what_msgpack_cannot_pack() -> None:
    """A value of a foreign type is written as its repr: telemetry must not raise in user code."""
    log = make_log()

    assert log.append({"kind": "note", "value": 1 + 2j})

    assert log.append({"kind": "note", "value": 1 << 80})
    assert log.append({"kind": "note", "value": "file\udc80"})

    unpacker = msgpack.Unpacker()
    unpacker.feed(log.read(0, 3))
    assert [row["value"] for row in unpacker] == ["(1+2j)", str(1 << 80), r"file\x80"]


def test_log_takes_appends_of_many_threads() -> None:
    """No map of any thread is lost or mixed with another's."""
    log = make_log(64 * 1024)

    def append(thread: int) -> None:
        for number in range(200):
            assert log.append({"thread": thread, "number": number})

    threads = [threading.Thread(target=append, args=(thread,)) for thread in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    unpacker = msgpack.Unpacker()
    unpacker.feed(log.read(0, log.appended))
    rows = list(unpacker)
    assert len(rows) == 800
    for thread in range(4):
        assert [row["number"] for row in rows if row["thread"] == thread] == list(range(200))


def test_log_waits_for_another_thread() -> None:
    """One that holds the lock may wait for a core of a busy host: no map is lost for that."""
    log, taken = make_log(), []
    with log._lock:
        thread = threading.Thread(target=lambda: taken.append(log.append({"kind": "value"})))
        thread.start()
        thread.join(0.5)
        assert taken == []

    thread.join(60)
    assert (taken, log.appended, log.dropped) == ([True], 1, 0)


def test_log_gives_up_instead_of_hanging_when_its_lock_is_held() -> None:
    """A signal handler that interrupted an append loses its map, counted, rather than the training its life."""
    log = make_log()

    with log._lock:
        assert not log.append({"kind": "exit"})

    assert log.dropped == 1


def test_released_rows_are_still_there() -> None:
    """Rows whose pages were given back can be read and overwritten as before, also where the ring has wrapped."""
    ring = make_ring(4096)
    fill(ring, 4096 + 100)
    before = ring.read_from(0, 4096)

    ring.release(ring.oldest(), ring.appended)

    assert before.n == 4095
    assert ring.read_from(0, 4096) == before
    fill(ring, 1)
    assert numbers(ring.read_from(ring.appended - 2).data) == [4195, 4196]


def test_a_name_that_is_not_utf8_is_stored_with_its_bytes_escaped():
    """The file of a line, for example: a question mark would make two files one."""
    assert msgpack.unpackb(pack_map({"file": "/d\udcff/a.py"})) == {"file": r"/d\xff/a.py"}
