"""What can be read of a process that was killed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import msgpack
import pytest

from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import find_flights, pending_row_path
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.flight_owner import is_alive
from traceml.database.flight.postmortem import FlightSnapshot, read_flight
from traceml.database.schema import LINE_OTHER, STEPS, Phase, Slot
from traceml.errors import StoreError

Start = Callable[..., "Popen[str]"]


def left_behind(folder: Path) -> FlightFile:
    """Make a file whose writer is gone, as far as anyone can tell."""
    flight = FlightFile.create(folder, {"rank": 1}, capacities={"evals": 8})
    flight.close(unlink=False)
    return flight


def rewrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_kill_9_at_any_moment_loses_no_row_and_tears_none(program: Start, tmp_path: Path) -> None:
    """30 writers killed in a tight loop: every counted row is whole, none that was done is missing, open phases too."""
    victims = [
        json.loads(line)
        for line in program("flight.killed_writers", "kill_many", tmp_path, 30, 7).communicate()[0].splitlines()
    ]

    assert len(victims) == 30
    rows_seen = phases_seen = maps_seen = 0
    for victim in victims:
        (path,) = find_flights(tmp_path, pid=victim["pid"])
        image = read_flight(path)
        appended = image.counters("steps").appended
        assert victim["done"] <= appended <= victim["begun"]
        first, data = image.rows("steps")
        assert first == max(0, appended - 4095)
        for number, row in enumerate(STEPS.struct.iter_unpack(data), start=first):
            assert row == (number, *[number * 1000 + i for i in range(1, len(STEPS.names))])
            rows_seen += 1

        for number, note in enumerate(image.log_rows("info")):
            assert note["number"] == number
            maps_seen += 1

        assert image.counters("info").appended in (appended // 100, max(0, appended // 100 - 1))
        assert image.identity["rank"] == 3
        if victim["phase"]:
            phases_seen += 1
            phase, since_ns = image.open_phase
            assert phase == victim["phase"] - 1
            assert 0 < since_ns < time.perf_counter_ns()

    assert rows_seen > 300
    assert maps_seen > 0
    assert phases_seen > 5


def test_forked_child_does_not_make_the_file_look_alive(program: Start, tmp_path: Path) -> None:
    """A data loader's worker that outlives its killed parent holds no lock on the file."""
    process = program("flight.killed_writers", "orphan", tmp_path)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())

    os.kill(pids["worker"], 0)  # lives
    (path,) = find_flights(tmp_path, pid=pids["writer"])
    assert not is_alive(path)
    assert read_flight(path).rows("evals") == (0, struct.pack("@6q", 1, 2, 3, 4, 0, 0))


def test_live_file_is_refused(program: Start, tmp_path: Path) -> None:
    """The file of a running process is not read; the end of a child changes nothing."""
    process = program("flight.killed_writers", "hold", tmp_path)
    assert process.stdout is not None
    path = Path(json.loads(process.stdout.readline())["path"])

    assert is_alive(path)
    with pytest.raises(StoreError, match="belongs to a running process"):
        read_flight(path)
    assert FlightSnapshot(path, path.read_bytes()).counters("evals").appended == 1
    process.communicate()

    assert not is_alive(path)
    assert read_flight(path).counters("evals").appended == 1


def test_innermost_phase_is_the_one_begun_last(tmp_path: Path) -> None:
    """Of nested phases the innermost is named, with its start; between phases the step's start is."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    flight.log("names").append({"id": 0, "name": "warm"})
    flight.log("names").append({"id": 1, "name": "augment"})

    flight.open_slots[Slot.STEP_START] = 900
    assert FlightSnapshot(flight.path, flight.path.read_bytes()).open_phase == (None, 900)

    flight.open_slots[Slot.STEP] = 12
    flight.open_slots[Phase.OPTIMIZER] = 1000
    flight.open_slots[Phase.USER] = 1005
    flight.open_slots[Slot.USER_NAME] = 1
    flight.open_slots[Slot.STATE] = FlightState.RUNNING
    image = FlightSnapshot(flight.path, flight.path.read_bytes())

    assert image.open_phase == (Phase.USER, 1005)
    assert image.open_user_phase == "augment"
    assert image.open_step == 12
    assert image.is_in_step
    assert image.state is FlightState.RUNNING
    assert image.slot(Slot.STEP_START) == 900
    flight.close(unlink=True)


@pytest.mark.parametrize(
    ("slots", "is_in_step"),
    [
        ({Slot.STEP: -1}, False),
        ({Slot.EVALUATING: 2}, False),
        ({Slot.EVALUATING: 2, Slot.ITERATING: 1}, True),
        ({Slot.EXIT_START: 950}, False),
    ],
    ids=["before the first", "after the loop", "in the next epoch since the last heartbeat", "as the process ends"],
)
def test_the_open_step_is_none_after_the_last_one(tmp_path: Path, slots: dict[Slot, int], is_in_step: bool) -> None:
    """The end of a step opens the next one, of which a training that is over has done nothing."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    flight.open_slots[Slot.STEP_START], flight.open_slots[Slot.STEP] = 900, 12
    for slot, value in slots.items():
        flight.open_slots[slot] = value

    assert FlightSnapshot(flight.path, flight.path.read_bytes()).is_in_step is is_in_step
    flight.close(unlink=True)


@pytest.mark.parametrize(("backward_at", "is_done"), [(0, True), (950, False)], ids=["between phases", "in backward"])
def test_a_step_that_is_overdue_is_done_unless_a_phase_is_open(tmp_path: Path, backward_at: int, is_done: bool) -> None:
    """The recorder said so at its last heartbeat: another step may have begun since."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    flight.open_slots[Slot.STEP_START], flight.open_slots[Slot.EVALUATING] = 900, 3
    flight.open_slots[Phase.BACKWARD] = backward_at

    assert FlightSnapshot(flight.path, flight.path.read_bytes()).step_is_done is is_done
    flight.close(unlink=True)


@pytest.mark.parametrize(("exit_start", "is_evaluating"), [(0, True), (950, False)])
def test_a_process_that_ends_does_not_evaluate(tmp_path: Path, exit_start: int, is_evaluating: bool) -> None:
    """Of the last evaluation nothing else shows the end."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    flight.open_slots[Slot.EVALUATING], flight.open_slots[Slot.EXIT_START] = 1, exit_start

    assert FlightSnapshot(flight.path, flight.path.read_bytes()).is_evaluating is is_evaluating
    flight.close(unlink=True)


@pytest.mark.parametrize(
    ("words", "line_id"),
    [
        ({Slot.LINE_PHASE: Phase.FORWARD, Slot.LINE_AT: 1001}, 7),
        ({Slot.LINE_PHASE: Phase.FORWARD, Slot.LINE_AT: 999}, -1),
        ({Slot.LINE_PHASE: LINE_OTHER, Slot.LINE_AT: 1001}, -1),
        ({Slot.LINE_PHASE: LINE_OTHER, Slot.LINE_AT: 901, Phase.FORWARD: 0}, 7),
        ({Slot.LINE_PHASE: LINE_OTHER, Slot.LINE_AT: 899, Phase.FORWARD: 0}, -1),
        ({Slot.LINE_PHASE: LINE_OTHER, Slot.LINE_AT: 901, Phase.FORWARD: 0, Slot.STEP_START: 0}, -1),
        ({}, -1),
    ],
)
def test_the_last_line_is_that_of_the_open_phase(tmp_path: Path, words: dict[int, int], line_id: int) -> None:
    """A line that was seen in the phase before, in an earlier step, or between steps is not where it ended."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    opened = {Slot.STEP_START: 900, Phase.FORWARD: 1000, Slot.LINE: 7}
    for slot, value in {**opened, **words}.items():
        flight.open_slots[slot] = value

    assert FlightSnapshot(flight.path, flight.path.read_bytes()).line_id == line_id
    flight.close(unlink=True)


def test_rows_and_maps_come_from_where_the_store_stands(tmp_path: Path) -> None:
    """Unacknowledged rows come as a frame, from exactly the next expected row on."""
    flight = FlightFile.create(tmp_path, {}, capacities={"evals": 8})
    assert flight.path is not None
    for number in range(20):
        flight.ring("evals").append(number, 0, 0, 0, 0, 0)
    flight.ring("evals").acked = 15
    for number in range(3):
        flight.log("names").append({"id": number, "name": "n"})
    flight.close(unlink=False)

    image = read_flight(flight.path)

    assert image.counters("evals").acked == 15
    assert [row[0] for row in struct.iter_unpack("@6q", image.read_from("evals", 15).data)] == [15, 16, 17, 18, 19]
    assert image.read_from("evals", 3)[:2] == (13, 7)
    assert image.read_from("evals", 20) == (20, 0, b"")
    assert image.read_from("names", 2)[:2] == (2, 1)
    assert image.log_rows("names")[1] == {"id": 1, "name": "n"}


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"NOTMAGIC", "damaged: its header is incomplete"),
        (8, struct.pack("@q", 99), "format 99, this traceml reads 3"),
        (16, struct.pack("@q", 1 << 30), "truncated"),
        (12288, b"\xc1" * 64, "header cannot be unpacked"),
    ],
)
def test_damaged_file_is_reported_with_what_to_do(tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    """Damage and other versions are named with the file, never half read."""
    path = left_behind(tmp_path).path
    assert path is not None

    rewrite(path, offset, data)

    with pytest.raises(StoreError, match=words) as caught:
        read_flight(path)
    assert str(path) in str(caught.value)
    assert "elete it" in str(caught.value)


def test_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    """Rows of another layout are never read as ours."""
    path = left_behind(tmp_path).path
    assert path is not None
    data = path.read_bytes()

    rewrite(path, 0, data.replace(b"forward_ns", b"forwird_ns"))

    with pytest.raises(StoreError, match="columns that this version of traceml does not know"):
        read_flight(path)


def test_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    """A missing file is reported as missing; it is not alive."""
    with pytest.raises(StoreError, match=r"gone\.flight cannot be read"):
        read_flight(tmp_path / "gone.flight")
    assert not is_alive(tmp_path / "gone.flight")


@pytest.mark.parametrize("kind", ["fifo", "link", "foreign"])
@pytest.mark.needs("root")
def test_only_a_regular_file_of_this_user_is_read(tmp_path: Path, kind: str) -> None:
    """A FIFO would stop its reader for good, and another user's file may say anything."""
    path = left_behind(tmp_path).path
    assert path is not None
    if kind == "foreign":
        os.chown(path, 12345, -1)
    else:
        moved = path.rename(tmp_path / "moved")
        os.mkfifo(path) if kind == "fifo" else path.symlink_to(moved)

    assert not is_alive(path)
    with pytest.raises(StoreError, match="cannot be read"):
        read_flight(path)


def test_folders_that_the_file_names_are_not_touched(tmp_path: Path) -> None:
    """Files on disk are looked for in known folders under the file's own name: what it says of others is no path."""
    precious = tmp_path / "precious.files"
    precious.mkdir(mode=0o700)
    (precious / "thesis").write_text("text")
    (tmp_path / "precious.logged.journal").write_text("text")
    flight = FlightFile.create(tmp_path / "flights", {"journal": [str(tmp_path / "precious")]})
    flight.log("logged").append({"kind": "text"})
    flight.close(unlink=False)
    assert flight.path is not None

    image = read_flight(flight.path, tmp_path)

    assert image.spooled_files == []
    assert image.journals == {}
    image.unlink()
    assert (precious / "thesis").read_text() == "text"
    assert (tmp_path / "precious.logged.journal").exists()
    assert not flight.path.exists()


def test_a_file_that_cannot_be_removed_stays(tiny_disk: Callable[[int], Path], tmp_path: Path) -> None:
    """The aggregator that has stored its rows goes on: it did not, and tried again four times a second."""
    written, disk = left_behind(tmp_path / "flights").path, tiny_disk(64 << 20)
    assert written is not None
    path = shutil.copytree(written.parent, disk / "flights") / written.name
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    read_flight(path, tmp_path).unlink()

    assert path.exists()


@pytest.mark.needs("root")
def test_a_spool_that_somebody_else_put_beside_it_is_not_touched(tmp_path: Path) -> None:
    """Neither its files nor its rows are taken, and it is not removed."""
    path = left_behind(tmp_path).path
    assert path is not None
    spool = path.with_suffix(".files")
    spool.mkdir(mode=0o700)
    (spool / "00.bin").write_text("planted")
    pending_row_path(spool, 1).write_bytes(b"\x81\xa4name\xa1x")
    os.chown(spool, 12345, -1)

    image = read_flight(path)

    assert image.spooled_files == []
    assert image.pending_rows == []
    image.unlink()
    assert spool.exists()


def test_a_pipe_in_the_spool_stops_nobody(tmp_path: Path) -> None:
    """An unpacked archive may hold one: only regular files are taken."""
    path = left_behind(tmp_path).path
    assert path is not None
    spool = path.with_suffix(".files")
    spool.mkdir(mode=0o700)
    os.mkfifo(spool / "pipe")
    os.mkfifo(pending_row_path(spool, 1))

    image = read_flight(path)

    assert image.spooled_files == []
    assert image.pending_rows == []


def test_maps_before_a_damaged_one_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damage in a log costs what is behind it there, and no row of another table."""
    flight = FlightFile.create(tmp_path, {"rank": 1})
    assert flight.path is not None
    for number in range(3):
        flight.log("names").append({"id": number, "name": f"name {number}"})
        flight.ring("evals").append(number, 0, 0, 0, 0, 0)
    flight.close(unlink=False)
    at = flight.path.read_bytes().index(b"name 1")
    rewrite(flight.path, at - 8, b"\xc1" * 8)

    image = read_flight(flight.path)

    assert image.log_rows("names") == [{"id": 0, "name": "name 0"}]
    assert image.read_from("names")[:2] == (0, 1)
    assert image.read_from("evals").n == 3
    assert [row["id"] for row in image.all_maps("names")] == [0]
    assert "2 of the 3 rows of its log 'names'" in caplog.text


@pytest.mark.parametrize(("word", "number"), [(0, 2), (0, -7), (1, 4), (2, 1 << 60), (3, -1), (4, 9)])
def test_impossible_counters_cost_their_table_alone(
    tmp_path: Path, word: int, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """More rows sent, stored or removed than appended: nobody can say which rows are in memory."""
    flight = FlightFile.create(tmp_path, {"rank": 1})
    assert flight.path is not None
    for ring, columns in ((flight.ring("evals"), 6), (flight.ring("epochs"), 6)):
        for _ in range(3):
            ring.append(*[0] * columns)
        ring.sent = ring.acked = 3
    slot = flight.ring("evals").slot
    flight.close(unlink=False)
    rewrite(flight.path, 8 * (slot + word), struct.pack("@q", number))

    image = read_flight(flight.path)

    assert image.read_from("evals").n == 0
    assert image.waiting("evals") == 0
    assert image.read_from("epochs").n == 3
    assert caplog.text.count("the counters of its table 'evals' are damaged") == 1


@pytest.mark.parametrize(("place", "number"), [(1, 1 << 40), (2, 3), (2, -1), (3, 5)])
def test_tables_out_of_bounds_are_damage(tmp_path: Path, place: int, number: int) -> None:
    """Offset, capacity and size of rows are those of a writer, or nothing is read."""
    path = left_behind(tmp_path).path
    assert path is not None
    entries = msgpack.unpackb(path.read_bytes()[12288:16384].rstrip(b"\0"), strict_map_key=False)
    entries[0][place] = number
    packed = msgpack.packb(entries)
    rewrite(path, 12288, packed)
    rewrite(path, 64, struct.pack("@q", len(packed)))

    with pytest.raises(StoreError, match="is out of bounds"):
        read_flight(path)
