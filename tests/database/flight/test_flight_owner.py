"""Whether the writer of a flight file lives, and when the file of a dead one goes."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from tests.database.flight.test_postmortem import left_behind, rewrite
from traceml.clock import machine_name, monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import find_flights
from traceml.database.flight.flight_header import MAGIC
from traceml.database.flight.flight_owner import is_alive, remove_stale
from traceml.database.flight.postmortem import FlightSnapshot, read_flight
from traceml.errors import StoreError

Start = Callable[..., "Popen[str]"]


def of_another_boot(folder: Path, machine: str, *, hours: float, logged: bool = False) -> Path:
    """Make a file that another boot, of this or another machine, wrote until some hours ago."""
    flight = FlightFile.create(folder, {"machine": machine, "boot_id": "00000000-0000-0000-0000-000000000000"})
    assert flight.path is not None
    if logged:
        flight.log("logged").append({"kind": "text"})

    then_s = time.time() - hours * 3600
    rewrite(flight.path, 24, struct.pack("@qq", monotonic_ns(), int(then_s * 1e9)))
    flight.close(unlink=False)
    os.utime(flight.path, (then_s, then_s))
    return flight.path


def test_looking_at_its_own_file_does_not_drop_the_lock(program: Start, tmp_path: Path) -> None:
    """Every way of looking leaves a rank's own file locked for others: no second descriptor is ever closed."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None

    assert is_alive(flight.path)
    with pytest.raises(StoreError, match="running process"):
        read_flight(flight.path)
    assert remove_stale(tmp_path, grace_s=-1) == []

    assert json.loads(program("flight.lock_readers", flight.path).communicate()[0]) == {"alive": True, "removed": []}
    flight.close(unlink=True)


def test_dead_file_stays_for_a_grace_after_it_was_found(tmp_path: Path) -> None:
    """The first cleaner only notes that the owner is dead; once the grace is over the file goes."""
    path = left_behind(tmp_path).path
    assert path is not None
    os.utime(path, (0, 0))  # its own date tells nothing: mapped writes do not change it

    assert remove_stale(tmp_path, grace_s=60) == []
    assert read_flight(path).identity["rank"] == 1
    rewrite(path, 72, struct.pack("@q", int(time.time()) - 61))

    assert remove_stale(tmp_path, grace_s=60) == [path]
    assert find_flights(tmp_path) == []


def test_no_journals_are_searched_for_a_file_that_stays_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search reads the whole folder, and a rank begins with looking at each file."""
    path = left_behind(tmp_path).path
    searched = []

    def journals(snapshot: FlightSnapshot) -> dict[str, Path]:
        searched.append(snapshot.path)
        return {}

    monkeypatch.setattr(FlightSnapshot, "journals", property(journals))
    assert remove_stale(tmp_path, grace_s=60) == []
    assert searched == []

    assert remove_stale(tmp_path, grace_s=-1) == [path]
    assert searched


def test_a_file_from_before_a_reboot_is_dead(tmp_path: Path) -> None:
    """Its last sign of life is older than this boot of the same machine; its rows are kept like those of others."""
    path = of_another_boot(tmp_path, machine_name(), hours=24 * 365 * 40)

    assert not is_alive(path)
    assert remove_stale(tmp_path, grace_s=60) == []
    assert not is_alive(path)  # although the cleanup has just written into it
    rewrite(path, 72, struct.pack("@q", int(time.time()) - 61))
    assert remove_stale(tmp_path, grace_s=60) == [path]


def test_a_file_of_another_host_stays_while_its_rank_may_live(tmp_path: Path) -> None:
    """Some network filesystems keep locks to a host: a missing lock proves nothing, a day of silence does."""
    recent, silent = of_another_boot(tmp_path, "node7/", hours=23), of_another_boot(tmp_path, "node7/", hours=25)

    assert is_alive(recent)
    assert not is_alive(silent)
    assert remove_stale(tmp_path, grace_s=-1) == [silent]
    assert recent.exists()


def test_a_clone_of_this_machine_that_lives_is_left_alone(tmp_path: Path) -> None:
    """The same names do not make it this machine: it was heard of after this boot."""
    assert is_alive(of_another_boot(tmp_path, machine_name(), hours=0))


def test_rows_of_the_user_stay_for_a_week_also_after_a_reboot(tmp_path: Path) -> None:
    """An aggregator has that long to store them."""
    path = of_another_boot(tmp_path, machine_name(), hours=24 * 365 * 40, logged=True)

    for age_s, removed in ((3601, []), (8 * 86400, [path])):
        rewrite(path, 72, struct.pack("@q", int(time.time()) - age_s))
        assert remove_stale(tmp_path) == removed


def test_the_scripts_clock_makes_no_file_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank looks for old files when it starts, also where its script has frozen the time: rows were lost."""
    left_behind(tmp_path)
    with monkeypatch.context() as script:
        script.setattr(time, "time", lambda: 1e9)
        assert remove_stale(tmp_path) == []

    assert remove_stale(tmp_path) == []


def test_a_fifo_stops_no_cleanup(tmp_path: Path) -> None:
    """It is neither opened for good nor removed."""
    os.mkfifo(tmp_path / "77-77-0.flight")

    assert remove_stale(tmp_path, grace_s=-1) == []
    assert not is_alive(tmp_path / "77-77-0.flight")


@pytest.mark.needs("root")
def test_a_folder_of_another_user_is_not_searched(tmp_path: Path) -> None:
    """Whoever owns the folder could have put anything there."""
    folder = tmp_path / "shared"
    folder.mkdir()
    path = of_another_boot(folder, machine_name(), hours=24 * 365 * 40)
    os.chown(folder, 12345, -1)

    assert find_flights(folder) == []
    assert remove_stale(folder, grace_s=-1) == []
    assert path.exists()


def test_live_file_is_never_removed(program: Start, tmp_path: Path) -> None:
    """A file whose lock is held stays, whatever the grace."""
    process = program("flight.killed_writers", "hold", tmp_path)
    assert process.stdout is not None
    path = Path(json.loads(process.stdout.readline())["path"])

    assert remove_stale(tmp_path, grace_s=-1) == []

    process.kill()
    process.wait()
    assert remove_stale(tmp_path, grace_s=-1) == [path]


def test_half_made_file_goes_when_it_is_old(tmp_path: Path) -> None:
    """A file whose writer died while making it has no header; its date decides."""
    half = tmp_path / "1-2-0.flight"
    half.write_bytes(b"\0" * len(MAGIC))

    assert remove_stale(tmp_path, grace_s=60) == []
    os.utime(half, (0, 0))
    assert remove_stale(tmp_path, grace_s=60) == [half]
