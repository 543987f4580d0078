"""Post-mortem reading of flight files: the tables and the open step of a dead rank.

A live rank holds a POSIX lock on its file. The kernel drops the lock when the process ends for any reason, even if its
forked children are still running.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgpack

from traceml.clock import boot_id
from traceml.database.journal import JOURNAL_SUFFIX, read_journal
from traceml.database.rings import COUNTERS_PER_TABLE, RowSlice
from traceml.database.schema import OPEN_SLOTS, TABLES, USER_TABLES, Phase, Slot, Table
from traceml.errors import StoreError

__all__ = [
    "ARTIFACTS",
    "COUNTERS_AT",
    "DATA_AT",
    "FLIGHT_SUFFIX",
    "IDENTITY_AT",
    "IDENTITY_BYTES",
    "LAYOUT_AT",
    "LAYOUT_BYTES",
    "MAGIC",
    "OPEN_SLOTS_AT",
    "OWN_FILES",
    "PROLOGUE",
    "VERSION",
    "FlightSnapshot",
    "FlightState",
    "TableCounters",
    "find_flights",
    "is_alive",
    "pending_row_path",
    "read_flight",
    "remove_stale",
    "spool_folder",
]

# The file: a header page of int64 words (prologue, open slots, counters), the identity twice (one is current while the
# other is rewritten), the layout of the tables, and the tables themselves.
MAGIC = b"TRACEMLF"
VERSION = 3
# magic, version, file size, monotonic and epoch timestamps of its creation, current identity (0 or 1), lengths of both
# identities, length of the layout, epoch second at which a cleanup first found the owner dead
PROLOGUE = struct.Struct("@8s9q")
DEAD_SINCE_AT = 72
OPEN_SLOTS_AT = 128
COUNTERS_AT = OPEN_SLOTS_AT + 8 * OPEN_SLOTS
IDENTITY_AT = (4096, 8192)
IDENTITY_BYTES = 4096
LAYOUT_AT = 12288
LAYOUT_BYTES = 4096
DATA_AT = 16384
FLIGHT_SUFFIX = ".flight"
ARTIFACTS = "artifacts"  # in a run's folder: logged files
_PENDING_SUFFIX = ".row"
_USER_ROWS_GRACE_S = 7 * 86400.0

_FLOCK = struct.Struct("@hhqqi4x")
_WORD = struct.Struct("@q")

# Files of this process by (pid, device, inode). Closing any descriptor of such a file would drop its lock, so it is
# never opened a second time.
OWN_FILES: dict[tuple[int, int, int], mmap.mmap] = {}

_log = logging.getLogger("traceml")


class FlightState(IntEnum):
    """Progress of a rank as it reported itself (slot STATE)."""

    STARTING = 0
    RUNNING = 1
    FINISHED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class TableCounters:
    """Counters of one table when the process died, in rows.

    `base` is the number of a log's first map in memory; earlier maps are stored or in the journal.
    """

    appended: int
    sent: int
    acked: int
    dropped: int
    base: int


@dataclass(frozen=True, slots=True)
class _TableExtent:
    """Location of a table in the file."""

    name: str
    offset: int
    capacity: int
    row_bytes: int


class FlightSnapshot:
    """Copy of a flight file: its writer, its rows, and the step and phase that were open at the end.

    Attributes:
        path: the file it was read from.
        identity: pid, start_ticks, boot_id, and the recorder's facts (rank, attempt, job, host).
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data
        prologue = _prologue(path, data)
        self.identity: dict[str, Any] = self._unpack(IDENTITY_AT[prologue[5] & 1], prologue[6 + (prologue[5] & 1)])
        self._tables: dict[str, tuple[int, _TableExtent]] = {}
        for index, (name, offset, capacity, row_bytes, layout) in enumerate(self._unpack(LAYOUT_AT, prologue[8])):
            self._check_layout(name, layout)
            self._tables[name] = (index, _TableExtent(name, offset, capacity, row_bytes))

        words = struct.unpack_from(f"@{OPEN_SLOTS}q", data, OPEN_SLOTS_AT)
        self._slots: tuple[int, ...] = words

    def __repr__(self) -> str:
        return f"FlightSnapshot({str(self.path)!r}, pid={self.identity.get('pid')}, state={self.state.name})"

    @property
    def tables(self) -> list[str]:
        """Names of the tables and logs in the file."""
        return list(self._tables)

    @property
    def state(self) -> FlightState:
        """The last state the rank reported."""
        return FlightState(self._slots[Slot.STATE])

    @property
    def same_boot(self) -> bool:
        """Whether its timestamps are comparable with this machine's clock."""
        return bool(self.identity.get("boot_id") == boot_id())

    @property
    def open_phase(self) -> tuple[Phase | None, int]:
        """The innermost open phase and the timestamp of its start; (None, start of the step) between phases."""
        stamps = self._slots[: len(Phase)]
        latest = max(stamps)
        # Nested phases are open together: the one that began last is the innermost.
        return (Phase(stamps.index(latest)), latest) if latest else (None, self._slots[Slot.STEP_START])

    @property
    def open_user_phase(self) -> str | None:
        """Name of the innermost open user phase, None without one."""
        if not self._slots[Phase.USER]:
            return None

        wanted = self._slots[Slot.USER_NAME]
        return next((row["name"] for row in self.log_rows("names") if row.get("id") == wanted), None)

    @property
    def open_step(self) -> int | None:
        """Number of the open step, None without one."""
        return self._slots[Slot.STEP] if self._slots[Slot.STEP] >= 0 else None

    def slot(self, slot: Slot) -> int:
        """Return the value of a slot."""
        return self._slots[slot]

    def counters(self, name: str) -> TableCounters:
        """Return a table's counters."""
        index, _ = self._tables[name]
        return TableCounters(*struct.unpack_from("@5q", self._data, COUNTERS_AT + index * COUNTERS_PER_TABLE * 8))

    def rows(self, name: str, start: int = 0) -> tuple[int, bytes]:
        """Return (number of the first row, rows) of a packed table from `start` on, as far as memory reaches back."""
        _, extent = self._tables[name]
        appended = self.counters(name).appended
        first = min(max(start, appended - extent.capacity + 1, 0), appended)
        if first == appended:
            return first, b""

        begin, end = first & (extent.capacity - 1), appended & (extent.capacity - 1)
        size = extent.row_bytes
        ring = memoryview(self._data)[extent.offset : extent.offset + extent.capacity * size]
        if begin < end:
            return first, bytes(ring[begin * size : end * size])

        return first, bytes(ring[begin * size :]) + bytes(ring[: end * size])

    def log_rows(self, name: str, start: int = 0) -> list[dict[str, Any]]:
        """Return a log's maps from number `start` on, as far as memory reaches back."""
        return self._walk(name)[0][max(start - self.counters(name).base, 0) :]

    @property
    def holds_user_rows(self) -> bool:
        """Whether it has rows logged by the user that are not stored yet."""
        if self.pending_rows:
            return True

        kept = (self.counters(name) for name in self._tables if name in USER_TABLES)
        return any(counters.acked < counters.appended for counters in kept)

    @property
    def _stems(self) -> list[Path]:
        places = self.identity.get("journal") or []
        return [self.path.with_suffix(""), *(Path(str(place)) for place in places)]

    @property
    def spooled_files(self) -> list[Path]:
        """Copied files that have not been uploaded to the run's folder."""
        folders = [spool_folder(stem) for stem in self._stems]
        return [path for folder in folders for path in sorted(folder.glob("[!.]*"))]

    @property
    def pending_rows(self) -> list[dict[str, Any]]:
        """Rows that wait for the upload of their files, including `spooled_files`."""
        found = []
        for path in self.pending_row_paths:
            try:
                row = msgpack.unpackb(path.read_bytes())
            except (OSError, ValueError, msgpack.UnpackException) as error:
                _log.debug("%s cannot be used: %r", path, error)
                continue

            if isinstance(row, dict):
                found.append(row)

        return found

    @property
    def pending_row_paths(self) -> list[Path]:
        """Files of `pending_rows`, in the order of the calls."""
        paths = [path for stem in self._stems for path in spool_folder(stem).glob(f".*{_PENDING_SUFFIX}")]
        return sorted(paths, key=lambda path: (len(path.name), path.name))

    @property
    def journals(self) -> dict[str, Path]:
        """Journals by table: next to the file, or in the folder that its writer chose."""
        found: dict[str, Path] = {}
        for stem in self._stems:
            for path in stem.parent.glob(f"{stem.name}.*{JOURNAL_SUFFIX}"):
                found.setdefault(path.name.removeprefix(f"{stem.name}.").removesuffix(JOURNAL_SUFFIX), path)

        return found

    def take_all(self, name: str, start: int = 0) -> Iterator[RowSlice]:
        """Yield the rows of a table or log from `start` on: first those in its journal, then those in memory."""
        journal = self.journals.get(name)
        for taken in read_journal(journal) if journal is not None else ():
            if taken.first + taken.n > start:
                yield taken
                start = taken.first + taken.n

        taken = self.take(name, start)
        if taken.n:
            yield taken

    def unlink(self) -> None:
        """Remove the file and its journals, as all rows are stored."""
        for path in (*self.journals.values(), self.path):
            path.unlink(missing_ok=True)

        for stem in self._stems:
            shutil.rmtree(spool_folder(stem), ignore_errors=True)

    def take(self, name: str, start: int = 0) -> RowSlice:
        """Return the rows of a table or log in memory from `start` on, as bytes for a frame."""
        if isinstance(TABLES.get(name), Table):
            first, data = self.rows(name, start)
            return RowSlice(first, len(data) // self._tables[name][1].row_bytes, data)

        rows, ends = self._walk(name)
        base = self.counters(name).base
        first = min(max(start - base, 0), len(rows))
        offset = self._tables[name][1].offset
        return RowSlice(base + first, len(rows) - first, self._data[offset + ends[first] : offset + ends[-1]])

    def _walk(self, name: str) -> tuple[list[dict[str, Any]], list[int]]:
        _, extent = self._tables[name]
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(self._data[extent.offset : extent.offset + extent.capacity])
        rows: list[dict[str, Any]] = []
        ends = [0]
        counters = self.counters(name)
        for _ in range(counters.appended - counters.base):
            rows.append(self._next_map(unpacker, name))
            ends.append(unpacker.tell())

        return rows, ends

    def _next_map(self, unpacker: msgpack.Unpacker, name: str) -> dict[str, Any]:
        try:
            row = unpacker.unpack()
        except (ValueError, msgpack.UnpackException) as error:
            raise _damaged(self.path, f"its log {name!r} cannot be unpacked") from error

        if not isinstance(row, dict):
            raise _damaged(self.path, f"its log {name!r} holds a value that is not a map")

        return row

    def _unpack(self, offset: int, length: int) -> Any:
        try:
            return msgpack.unpackb(self._data[offset : offset + length], strict_map_key=False)
        except (ValueError, msgpack.UnpackException) as error:
            raise _damaged(self.path, "its header cannot be unpacked") from error

    def _check_layout(self, name: str, layout: Any) -> None:
        table = TABLES.get(name)
        if table is None or table.layout != layout:
            raise StoreError(
                f"flight file {self.path}: table {name!r} has columns that this version of traceml does not know. "
                "Read it with the version that wrote it, or delete it."
            )


def spool_folder(stem: Path) -> Path:
    """Return the folder of files that wait for upload, by the path stem of their rank's journals."""
    return stem.with_name(f"{stem.name}.files")


def pending_row_path(folder: Path, number: int) -> Path:
    """Return the path of a row that is appended after the upload of its file from this folder."""
    return folder / f".{number}{_PENDING_SUFFIX}"


def read_flight(path: Path) -> FlightSnapshot:
    """Read a dead rank's flight file.

    Raises:
        StoreError: it cannot be read, is damaged, has another version, or its owner is still running.
    """
    if _own_mapping(path) is not None:
        raise _still_alive(path)

    try:
        with _open(path) as descriptor:
            if _is_locked(descriptor):
                raise _still_alive(path)

            return FlightSnapshot(path, _read_all(descriptor))
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"flight file {path} cannot be read: {error.strerror}") from error


def find_flights(folder: Path, *, pid: int | None = None) -> list[Path]:
    """Return the flight files in a folder by name, of one process when `pid` is given."""
    pattern = f"{pid}-*{FLIGHT_SUFFIX}" if pid is not None else f"*{FLIGHT_SUFFIX}"
    return sorted(folder.glob(pattern))


def is_alive(path: Path) -> bool:
    """Whether the writer of this flight file is running; False also when the file does not exist."""
    if _own_mapping(path) is not None:
        return True

    try:
        with _open(path) as descriptor:
            return _is_locked(descriptor)
    except OSError:
        return False


def remove_stale(folder: Path, *, grace_s: float = 3600.0) -> list[Path]:
    """Remove old flight files of dead processes; return the removed ones.

    A file is removed when its owner is dead and it is from another boot, or was first found dead more than `grace_s`
    ago: a restarted aggregator has that long to read it. A file with unstored rows of the user stays for a week.
    """
    removed = []
    for path in find_flights(folder):
        try:
            if _own_mapping(path) is None and _is_stale(path, grace_s):
                for leftover in (*_journals_of(path), path):
                    leftover.unlink(missing_ok=True)

                removed.append(path)
        except OSError as error:
            _log.debug("stale flight file %s stays: %s", path, error)

    return removed


def _is_stale(path: Path, grace_s: float) -> bool:
    now = int(time.time())
    with _open(path, os.O_RDWR) as descriptor:
        if _is_locked(descriptor):
            return False

        try:
            snapshot = FlightSnapshot(path, os.pread(descriptor, DATA_AT, 0))
        except StoreError:
            # Incomplete, damaged or of another version: use the file's modification time.
            return now - os.fstat(descriptor).st_mtime > grace_s

        if not snapshot.same_boot:
            return True

        dead_since = _WORD.unpack(os.pread(descriptor, 8, DEAD_SINCE_AT))[0]
        if not dead_since:
            os.pwrite(descriptor, _WORD.pack(now), DEAD_SINCE_AT)
            dead_since = now

        return bool(now - dead_since > (max(grace_s, _USER_ROWS_GRACE_S) if snapshot.holds_user_rows else grace_s))


def _journals_of(path: Path) -> list[Path]:
    try:
        with _open(path) as descriptor:
            snapshot = FlightSnapshot(path, os.pread(descriptor, DATA_AT, 0))
            return [*snapshot.journals.values(), *snapshot.spooled_files, *snapshot.pending_row_paths]
    except (OSError, StoreError):  # incomplete or damaged: its journals are unknown
        return []


def _own_mapping(path: Path) -> mmap.mmap | None:
    try:
        status = path.stat()
    except OSError:
        return None

    return OWN_FILES.get((os.getpid(), status.st_dev, status.st_ino))


@contextmanager
def _open(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    # Query the lock, do not take it: two readers must not mistake each other for the owner.
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    parts: list[bytes] = []
    done = 0
    while done < size and (part := os.pread(descriptor, size - done, done)):
        parts.append(part)
        done += len(part)

    return b"".join(parts)


def _prologue(path: Path, data: bytes) -> tuple[Any, ...]:
    if len(data) < DATA_AT or data[:8] != MAGIC:
        raise _damaged(path, "its header is incomplete")

    prologue = PROLOGUE.unpack_from(data)
    if prologue[1] != VERSION:
        raise StoreError(
            f"flight file {path} has format {prologue[1]}, this traceml reads {VERSION}. "
            "Read it with the version that wrote it, or delete it."
        )

    if len(data) not in (prologue[2], DATA_AT):
        raise _damaged(path, f"it is truncated: {len(data)} of {prologue[2]} bytes")

    return prologue


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"flight file {path} is damaged: {why}. Delete it.")


def _still_alive(path: Path) -> StoreError:
    return StoreError(f"flight file {path} belongs to a running process; it can be read after the process ends.")
