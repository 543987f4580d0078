"""Owners of flight files: whether the writer lives, and removal of what dead ones left.

A live rank holds a POSIX lock on its file. The kernel drops the lock when the process ends for any reason, even if its
forked children are still running. Another host may not see the lock: some network filesystems keep locks to a host.

Process: aggregator, `traceml report` and `sync`, and the agent of a launch; a rank, for what earlier ones left.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.clock import boot_time_s, machine_name, process_start_ticks
from traceml.clock import own_time as time
from traceml.database.flight.flight_folders import FALLBACK_FOLDER, default_folder, disk_folders, find_flights
from traceml.database.flight.flight_header import DATA_AT, DEAD_SINCE_AT, is_locked, lock_holder, own_mapping
from traceml.database.schema import STEPS
from traceml.errors import StoreError
from traceml.run_folder import COPIES_FOLDER
from traceml.trusted_files import opened_trusted

if TYPE_CHECKING:
    from traceml.database.flight.postmortem import FlightSnapshot

__all__ = [
    "ROWS_KEPT_S",
    "SILENCE_S",
    "USER_ROWS_KEPT_S",
    "find_unclaimed",
    "has_left_flights",
    "is_alive",
    "pid_here",
    "remove_stale",
    "silent_elsewhere",
    "waiting_steps",
]

ROWS_KEPT_S = 3600.0
"""How long the files of dead ranks stay at least."""
USER_ROWS_KEPT_S = 7 * 86400.0
"""The same of files with rows that the user logged."""
SILENCE_S = 86400.0
"""A rank on another host counts as dead after this long without a sign of life: its recorder wakes every second."""
_WORD = struct.Struct("@q")

_log = logging.getLogger("traceml")


def is_alive(path: Path, silence_s: float = SILENCE_S) -> bool:
    """Whether the writer of this flight file may be running; False also when this user has no such file.

    Args:
        silence_s: how long a writer on another host may be silent.
    """
    if own_mapping(path) is not None:
        return True

    try:
        with opened_trusted(path) as descriptor:
            return is_locked(descriptor) or _may_live_elsewhere(_header(path, descriptor), descriptor, silence_s)
    except (OSError, StoreError):
        return False


def pid_here(path: Path, pid: int, start_ticks: int) -> int | None:
    """Return the number of a flight file's writer in the pid namespace of this process; None if it is not seen here.

    Args:
        pid: its number in its own pid namespace, as that of a container.
        start_ticks: its start, which is the same in all of them.
    """
    if process_start_ticks(pid) == start_ticks:
        return pid

    if own_mapping(path) is not None:  # closing a second descriptor of an own file would drop its lock
        return None

    try:
        with opened_trusted(path) as descriptor:
            holder = lock_holder(descriptor)
    except OSError:
        return None

    return holder if holder is not None and process_start_ticks(holder) == start_ticks else None


def find_unclaimed(folders: Iterable[Path]) -> list[Path]:
    """Return the flight files in some folders, without those whose rank has one in memory of this host too."""
    memory = default_folder()
    in_memory = {path.name for path in find_flights(memory)}
    return [
        path
        for folder in dict.fromkeys(folders)
        for path in find_flights(folder)
        if folder == memory or path.name not in in_memory
    ]


def remove_stale(*folders: Path, runs_dir: Path | None = None, grace_s: float = ROWS_KEPT_S) -> list[Path]:
    """Remove old flight files of dead processes; return the removed ones.

    A file is removed when its owner was first found dead more than `grace_s` ago: a restarted aggregator has that long
    to read it. A file with unstored rows of the user stays for a week.

    Args:
        grace_s: how long the files of a dead process stay.
    """
    removed = []
    for path in find_unclaimed(folders):
        try:
            if own_mapping(path) is None and _remove_if_stale(path, runs_dir, grace_s):
                removed.append(path)
        except OSError as error:
            _log.debug("stale flight file %s stays: %s", path, error)

    return removed


def waiting_steps(run_dir: Path) -> int:
    """Count the steps of a run that its dead ranks left in flight files of this host."""
    folders = (default_folder(), run_dir.parent / FALLBACK_FOLDER)
    return sum(_of_dead(folders, run_dir, lambda snapshot: snapshot.waiting(STEPS.name)))


def has_left_flights(run_dir: Path) -> bool:
    """Whether dead ranks of a run left flight files on this host."""
    folders = (default_folder(), *disk_folders(run_dir.parent))
    return bool(find_flights(run_dir / COPIES_FOLDER)) or any(_of_dead(folders, run_dir, lambda _: True))


def _of_dead(folders: Iterable[Path], run_dir: Path, read: Callable[[FlightSnapshot], int]) -> Iterator[int]:
    """Yield a fact of each file that a dead rank of a run has left."""
    for path in find_unclaimed(folders):
        try:
            with opened_trusted(path) as descriptor:
                if own_mapping(path) is None and not is_locked(descriptor):
                    snapshot = _header(path, descriptor, run_dir.parent)
                    known = snapshot.identity.get("run_dir")
                    if known and Path(str(known)).resolve() == run_dir.resolve():
                        yield read(snapshot)
        except (OSError, StoreError) as error:
            _log.debug("flight file %s is not read: %s", path, error)


def silent_elsewhere(runs_dir: Path) -> list[FlightSnapshot]:
    """Return the files in a runs folder whose ranks may live on another host, and whose rows wait for that reason."""
    found = []
    for path in find_flights(runs_dir / FALLBACK_FOLDER):
        try:
            with opened_trusted(path) as descriptor:
                snapshot = _header(path, descriptor, runs_dir)
                if not is_locked(descriptor) and _may_live_elsewhere(snapshot, descriptor, SILENCE_S):
                    found.append(snapshot)
        except (OSError, StoreError) as error:
            _log.debug("flight file %s is not looked at: %s", path, error)

    return found


def _remove_if_stale(path: Path, runs_dir: Path | None, grace_s: float) -> bool:
    now = int(time.time())
    with opened_trusted(path, os.O_RDWR) as descriptor:
        if is_locked(descriptor):
            return False

        try:
            snapshot = _header(path, descriptor, runs_dir)
        except StoreError:
            return _unlink_if_old(path, now - os.fstat(descriptor).st_mtime, grace_s)

        if _may_live_elsewhere(snapshot, descriptor, SILENCE_S):
            return False

        if not snapshot.dead_since_s:
            os.pwrite(descriptor, _WORD.pack(now), DEAD_SINCE_AT)

    age_s = now - (snapshot.dead_since_s or now)
    # By age first: what waits for storage is in journals, for which the folder is searched.
    if age_s <= grace_s or (age_s <= USER_ROWS_KEPT_S and snapshot.holds_user_rows):
        return False

    snapshot.unlink()
    return not path.exists()


def _unlink_if_old(path: Path, age_s: float, grace_s: float) -> bool:
    """Remove a file that is incomplete, damaged or of another version."""
    if age_s <= grace_s:
        return False

    path.unlink(missing_ok=True)
    return True


def _header(path: Path, descriptor: int, runs_dir: Path | None = None) -> FlightSnapshot:
    from traceml.database.flight.postmortem import FlightSnapshot  # here, as most ranks find no file of a dead one

    return FlightSnapshot(path, os.pread(descriptor, DATA_AT, 0), runs_dir)


def _may_live_elsewhere(snapshot: FlightSnapshot, descriptor: int, silence_s: float) -> bool:
    """Whether the writer may run on another host, whose lock this one may not see."""
    if snapshot.same_boot or snapshot.dead_since_s:
        return False

    last_s = max(snapshot.last_beat_s, os.fstat(descriptor).st_mtime)
    # A machine of this name that was last heard of before this boot is this one.
    if snapshot.identity.get("machine") == machine_name() and last_s < boot_time_s():
        return False

    return time.time() - last_s < silence_s
