"""The flight file: made wherever it can be, reserved in full, and never the end of the training."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.database.conftest import ROOT
from traceml.clock import boot_id, machine_name, process_start_ticks
from traceml.database.flight import flight as module
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.flight_owner import is_alive
from traceml.database.flight.postmortem import FlightSnapshot, read_flight
from traceml.database.schema import LOGS, PACKED, Phase, Slot

KIB = 1024


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())


def test_holds_every_table_and_says_who_writes(tmp_path: Path) -> None:
    """A new file has all tables empty, no step open, and the identity of this process."""
    flight = FlightFile.create(tmp_path, {"rank": 2, "job": "j"})

    assert flight.path is not None
    assert flight.path.parent == tmp_path
    assert set(flight.rings) == {table.name for table in PACKED}
    assert set(flight.logs) == {log.name for log in LOGS}
    assert all(ring.appended == 0 for ring in flight.rings.values())
    assert flight.open_slots[Slot.STEP] == -1
    assert flight.identity == {
        "pid": os.getpid(),
        "start_ticks": process_start_ticks(os.getpid()),
        "boot_id": boot_id(),
        "rank": 2,
        "job": "j",
        "machine": machine_name(),
    }
    assert flight.path.stat().st_mode & 0o777 == 0o600
    flight.close(unlink=True)
    assert not flight.path.exists()


def test_reserves_every_block(tmp_path: Path) -> None:
    """The file is as long on the disk as it claims: no page can be missing later."""
    flight = FlightFile.create(tmp_path, {})

    assert flight.path is not None
    status = flight.path.stat()
    assert status.st_blocks * 512 >= status.st_size
    flight.close(unlink=True)


def test_rows_of_two_tables_do_not_touch(tmp_path: Path) -> None:
    """Filling every ring and log to the brim leaves all of them as they were written."""
    flight = FlightFile.create(tmp_path, {}, capacities={table.name: 16 for table in PACKED})
    for number, (table, ring) in enumerate(zip(PACKED, flight.rings.values(), strict=True)):
        for _ in range(40):
            ring.append(*[number] * len(table.columns))

    flight.log("names").append({"id": 0, "name": "n"})
    for number, (table, ring) in enumerate(zip(PACKED, flight.rings.values(), strict=True)):
        expected = table.struct.pack(*[number] * len(table.columns))
        assert ring.read_from(ring.oldest()) == (25, 15, expected * 15)

    assert flight.log("info").appended == 0
    flight.close(unlink=True)


def test_rounds_capacities_up_to_powers_of_two(tmp_path: Path) -> None:
    """Slots are found by a mask, so a capacity is the next power of two."""
    flight = FlightFile.create(tmp_path, {}, capacities={"steps": 5000, "evals": 4096})

    assert flight.ring("steps").capacity == 8192
    assert flight.ring("evals").capacity == 4096
    flight.close(unlink=True)


def test_refuses_a_capacity_for_a_table_that_is_not_there(tmp_path: Path) -> None:
    """A misspelt table is the caller's error."""
    with pytest.raises(ValueError, match="no table 'stepz'"):
        FlightFile.create(tmp_path, {}, capacities={"stepz": 1})


@pytest.mark.process
def test_takes_a_sixteenth_of_a_small_disk(tiny_disk: Callable[[int], Path]) -> None:
    """On a container's common 64 MB /dev/shm the rings shrink, to powers of two, until they fit 1/16 of it."""
    folder = tiny_disk(64 * KIB * KIB)

    flight = FlightFile.create(folder, {})

    assert flight.path is not None
    assert flight.path.parent == folder
    assert flight.path.stat().st_size <= 4 * KIB * KIB
    steps = flight.ring("steps").capacity
    assert steps >= 4096
    assert steps & (steps - 1) == 0
    flight.close(unlink=True)


@pytest.mark.process
def test_falls_back_to_the_run_folder_and_says_so_once(
    tiny_disk: Callable[[int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A memory filesystem without room means a file in the run's folder, and one warning."""
    full = tiny_disk(256 * KIB)
    run_folder = tmp_path / "run"

    with caplog.at_level(logging.WARNING, "traceml"):
        flights = [FlightFile.create(full, {}, runs_dir=run_folder) for _ in range(2)]

    assert all(flight.path is not None and flight.path.parent == run_folder / FALLBACK_FOLDER for flight in flights)
    assert len(caplog.records) == 1
    assert str(full) in caplog.text
    assert str(run_folder) in caplog.text
    assert list(full.iterdir()) == []
    for flight in flights:
        flight.close(unlink=True)


def test_falls_back_to_memory_when_no_folder_will_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without any folder the rings work all the same, and the user learns what is lost."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")

    with caplog.at_level(logging.WARNING, "traceml"):
        flight = FlightFile.create(blocked, {}, runs_dir=blocked)

    flight.ring("evals").append(1, 2, 3, 4, 0, 0)
    assert flight.path is None
    assert flight.ring("evals").appended == 1
    assert "plain memory" in caplog.text
    assert repr(flight).startswith("FlightFile('memory'")
    flight.close(unlink=True)


@pytest.mark.process
def test_survives_a_disk_that_fills_up_while_it_is_made(tiny_disk: Callable[[int], Path], tmp_path: Path) -> None:
    """statvfs promised room which posix_fallocate does not find: the next place is taken, nothing is left behind."""
    folder = tiny_disk(64 * KIB * KIB)
    script = """
import os, sys
from pathlib import Path
from traceml.database.flight import flight
real = flight._free_bytes
flight._free_bytes = lambda folder: 1 << 40 if str(folder) == sys.argv[1] else real(folder)
(Path(sys.argv[1]) / "filler").write_bytes(bytes(60 * 1024 * 1024))
made = flight.FlightFile.create(Path(sys.argv[1]), {}, runs_dir=Path(sys.argv[2]))
for n in range(made.ring("steps").capacity):
    made.ring("steps").appender("step")(n)
print(made.path.parent)
made.close(unlink=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == str(tmp_path / "run" / FALLBACK_FOLDER)
    assert [path.name for path in folder.iterdir()] == ["filler"]


@pytest.mark.process
def test_survives_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Plain memory replaces a file that may not grow (RLIMIT_FSIZE): no signal ends the process."""
    script = """
import resource, sys
from pathlib import Path
from traceml.database.flight.flight import FlightFile
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
made = FlightFile.create(Path(sys.argv[1]), {}, runs_dir=Path(sys.argv[2]))
for n in range(made.ring("steps").capacity):
    made.ring("steps").appender("step")(n)
print(made.path, made.ring("steps").appended)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a", tmp_path / "b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["None", "65536"]
    assert list((tmp_path / "a").iterdir()) == []
    assert list((tmp_path / "b" / FALLBACK_FOLDER).iterdir()) == []


def test_does_not_use_a_folder_into_which_others_may_write(tmp_path: Path) -> None:
    """Rows do not go where another user could put or read them."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)

    flight = FlightFile.create(shared, {}, runs_dir=tmp_path / "run")

    assert flight.path is not None
    assert flight.path.parent == tmp_path / "run" / FALLBACK_FOLDER
    flight.close(unlink=True)


def test_does_not_follow_a_link_in_place_of_its_folder(tmp_path: Path) -> None:
    """A link planted under the folder's name is refused."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")

    flight = FlightFile.create(tmp_path / "link", {})

    assert flight.path is None


def test_identity_changes_whole(tmp_path: Path) -> None:
    """The facts about the writer can change at any time, also to longer or too long ones."""
    flight = FlightFile.create(tmp_path, {"rank": 0})
    assert flight.path is not None

    flight.update_identity(rank=5, run_id="r" * 200)
    assert FlightSnapshot(flight.path, flight.path.read_bytes()).identity["rank"] == 5
    flight.update_identity(command="c" * 10_000, rank=6)

    image = FlightSnapshot(flight.path, flight.path.read_bytes())
    assert image.identity["rank"] == 6
    assert image.identity["run_id"] == "r" * 200
    assert "command" not in image.identity
    flight.close(unlink=True)


def test_stays_for_its_reader_when_closed_without_unlink(tmp_path: Path) -> None:
    """A file given up with rows unsent is no longer alive and can be read; a late append harms nobody."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    flight.ring("evals").append(1, 2, 3, 4, 0, 0)
    flight.open_slots[Slot.STATE] = FlightState.FINISHED

    flight.close(unlink=False)
    flight.close(unlink=False)
    flight.ring("evals").append(5, 6, 7, 8, 0, 0)

    assert not is_alive(flight.path)
    image = read_flight(flight.path)
    assert image.state is FlightState.FINISHED
    assert image.counters("evals").appended == 2


def test_a_process_may_make_several(tmp_path: Path) -> None:
    """init, shutdown, init: each recorder has a file of its own."""
    first, second = FlightFile.create(tmp_path, {}), FlightFile.create(tmp_path, {})

    assert first.path != second.path
    first.open_slots[Phase.FORWARD] = 7
    assert second.open_slots[Phase.FORWARD] == 0
    first.close(unlink=True)
    second.close(unlink=True)


def test_a_process_that_gave_up_its_rights_is_closed_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `os.setuid` it may not remove its file: the next one of the earlier user does, as its owner is dead."""
    flight = FlightFile.create(tmp_path, {})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        flight.close(unlink=True)

    assert flight.path is not None
    assert not is_alive(flight.path)


@pytest.mark.process
def test_imports_nothing_heavy() -> None:
    """The training process gets msgpack and the standard library, and no database."""
    script = (
        "import sys, traceml.database.flight.flight; "
        "print([m for m in ('numpy', 'sqlite3', 'zstandard') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
