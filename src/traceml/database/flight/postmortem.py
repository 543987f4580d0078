"""Post-mortem reading of flight files: the tables and the open step of a dead rank.

A live rank holds a POSIX lock on its file. The kernel drops the lock when the process ends for any reason, even if its
forked children are still running.

Process: aggregator, `traceml report` and `sync`, and the agent of a launch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from traceml.clock import boot_id
from traceml.database.flight.flight_folders import FLIGHT_SUFFIX, PENDING_SUFFIX, disk_folders, spool_folder
from traceml.database.flight.flight_header import (
    DATA_AT,
    IDENTITY_AT,
    LAYOUT_AT,
    MAGIC,
    OPEN_SLOTS_AT,
    PROLOGUE,
    VERSION,
    FlightState,
    is_locked,
    own_mapping,
)
from traceml.database.flight.journal import JOURNAL_SUFFIX, read_journal
from traceml.database.flight.row_rings import RowSlice
from traceml.database.flight.staged_files import STAGED, StagedFile
from traceml.database.flight.table_extents import (
    UNREADABLE,
    TableCounters,
    damaged,
    read_counters,
    read_layout,
    unpacked_header,
    whole_maps,
)
from traceml.database.schema import LINE_OTHER, OPEN_SLOTS, TABLES, USER_TABLES, Phase, Slot, Table
from traceml.errors import StoreError
from traceml.trusted_files import check_trusted_folder, opened_trusted

__all__ = ["FlightSnapshot", "PendingRow", "flight_identity", "may_be_of", "read_flight"]

_CRASH_BYTES = 256 << 10

_STATES = frozenset(FlightState)

_log = logging.getLogger("traceml")


class PendingRow(NamedTuple):
    """A row of `logged` whose file has not arrived, and its path."""

    row: dict[str, Any]
    path: Path

    @property
    def staged(self) -> StagedFile | None:
        """Its file if that was not copied yet."""
        how = self.row.get(STAGED)
        return StagedFile(self.path, how) if isinstance(how, dict) else None


class FlightSnapshot:
    """Copy of a flight file: its writer, its rows, and the step and phase that were open at the end.

    Args:
        runs_dir: the runs folder of its rank, if it is known: some of its files may be there. The file itself is not
            asked for folders, as what it names would be read and removed.

    Attributes:
        identity: pid, start_ticks, boot_id, machine, and the recorder's facts (rank, attempt, job, host).
    """

    def __init__(self, path: Path, data: bytes, runs_dir: Path | None = None) -> None:
        self.path = path
        self._data = data
        folders = dict.fromkeys((path.parent, *disk_folders(runs_dir)))
        self._stems = [folder / path.stem for folder in folders if _is_own_folder(folder)]
        self._prologue = _prologue(path, data)
        self.identity = self._read_identity()
        layout = unpacked_header(path, data[LAYOUT_AT : LAYOUT_AT + self._prologue[8]])
        self._tables = read_layout(path, layout, self._prologue[2])
        self._slots: tuple[int, ...] = struct.unpack_from(f"@{OPEN_SLOTS}q", data, OPEN_SLOTS_AT)
        self._counters: dict[str, TableCounters] = {}

    def __repr__(self) -> str:
        return f"FlightSnapshot({str(self.path)!r}, pid={self.identity.get('pid')}, state={self.state.name})"

    @property
    def tables(self) -> list[str]:
        """Names of the tables and logs in the file and in journals."""
        return list(dict.fromkeys([*self._tables, *self.journals]))

    @property
    def clock(self) -> tuple[int, int]:
        """Monotonic and epoch timestamps of the creation of the file, read together."""
        return self._prologue[3], self._prologue[4]

    @property
    def last_beat_s(self) -> float:
        """Epoch second of the last sign of life."""
        monotonic_ns, epoch_ns = self.clock
        return (epoch_ns + max(self.slot(Slot.HEARTBEAT) - monotonic_ns, 0)) / 1e9

    @property
    def dead_since_s(self) -> int:
        """Epoch second at which a cleanup first found the owner dead, 0 before."""
        return int(self._prologue[9])

    @property
    def state(self) -> FlightState:
        """The last state the rank reported; RUNNING where it cannot be read."""
        state = self._slots[Slot.STATE]
        return FlightState(state) if state in _STATES else FlightState.RUNNING

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
    def is_evaluating(self) -> bool:
        """Whether the model was evaluated, and the process had not come to its end."""
        return self._slots[Slot.EVALUATING] == 1 and not self._slots[Slot.EXIT_START]

    @property
    def crash_text(self) -> str:
        """The text that faulthandler wrote when the process crashed; empty if it did not."""
        return self._data[self._prologue[2] :][:_CRASH_BYTES].decode("utf-8", "replace")

    @property
    def open_user_phase(self) -> str | None:
        """Name of the innermost open user phase, None without one."""
        if not self._slots[Phase.USER]:
            return None

        wanted = self._slots[Slot.USER_NAME]
        return next((row["name"] for row in self.log_rows("names") if row.get("id") == wanted), None)

    @property
    def line_id(self) -> int:
        """Id in `names` of the user's line that was seen last, -1 if none was seen in the phase that is open."""
        phase, since_ns = self.open_phase
        opened = phase if phase is not None else LINE_OTHER
        is_of_phase = self._slots[Slot.LINE_PHASE] == opened and self._slots[Slot.LINE_AT] >= since_ns > 0
        return self._slots[Slot.LINE] if is_of_phase else -1

    @property
    def open_step(self) -> int | None:
        """Number of the open step, None without one."""
        return self._slots[Slot.STEP] if self._slots[Slot.STEP] >= 0 else None

    @property
    def is_in_step(self) -> bool:
        """Whether the process was in the open step, and had ended neither its training loop nor itself."""
        is_over = self._slots[Slot.EVALUATING] == 2 and not self._slots[Slot.ITERATING]
        return self.open_step is not None and not (is_over or self._slots[Slot.EXIT_START])

    @property
    def step_is_done(self) -> bool:
        """Whether the open step is the last one, as far as is known: the process was in none of its phases."""
        return self._slots[Slot.EVALUATING] == 3 and self.open_phase[0] is None

    def slot(self, slot: Slot) -> int:
        """Return the value of a slot."""
        return self._slots[slot]

    def counters(self, name: str) -> TableCounters:
        """Return a table's counters; for a table that is only in its journal, those that the journal shows."""
        if name not in self._tables:
            return TableCounters(max((found.first + found.n for found in self._journaled(name)), default=0), 0, 0, 0, 0)

        index, _ = self._tables[name]
        if name not in self._counters:
            self._counters[name] = read_counters(self.path, name, self._data, index)

        return self._counters[name]

    def waiting(self, name: str) -> int:
        """Count the rows of a packed table that are in memory and not stored."""
        counters, (_, extent) = self.counters(name), self._tables[name]
        return min(max(counters.appended - counters.acked, 0), extent.capacity - 1)

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

    def log_rows(self, name: str) -> list[dict[str, Any]]:
        """Return a log's maps, as far as memory reaches back, up to a damaged one."""
        return self._walk(name)[0]

    @property
    def holds_user_rows(self) -> bool:
        """Whether it has rows logged by the user that are not stored yet."""
        if self.pending_rows:
            return True

        counters = [self.counters(name) for name in self.tables if name in USER_TABLES]
        return any(each.acked < each.appended for each in counters)

    @property
    def spooled_files(self) -> list[Path]:
        """Copied files that have not been uploaded to the run's folder."""
        return [path for folder in self._spools for path in sorted(folder.glob("[!.]*")) if _is_regular(path)]

    @property
    def _spools(self) -> list[Path]:
        return [folder for folder in map(spool_folder, self._stems) if _is_own_folder(folder)]

    @property
    def pending_rows(self) -> list[PendingRow]:
        """Rows that wait for their files, in the order of the calls: files of `spooled_files`, or staged ones."""
        paths = [path for folder in self._spools for path in folder.glob(f".*{PENDING_SUFFIX}")]
        found = []
        for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
            try:
                with opened_trusted(path) as descriptor:
                    row = msgpack.unpackb(_read_all(descriptor))
            except (OSError, *UNREADABLE) as error:
                _log.debug("%s cannot be used: %r", path, error)
                continue

            if isinstance(row, dict):
                found.append(PendingRow(row, path))

        return found

    @property
    def journals(self) -> dict[str, Path]:
        """Journals by table: next to the file, or in the folders of journals."""
        found: dict[str, Path] = {}
        for stem in self._stems:
            for path in stem.parent.glob(f"{stem.name}.*{JOURNAL_SUFFIX}"):
                found.setdefault(path.name.removeprefix(f"{stem.name}.").removesuffix(JOURNAL_SUFFIX), path)

        return found

    def read_all(self, name: str, start: int = 0) -> Iterator[RowSlice]:
        """Yield the rows of a table or log from `start` on: first those in its journal, then those in memory."""
        for found in self._journaled(name):
            if found.first + found.n > start:
                yield found
                start = found.first + found.n

        found = self.read_from(name, start)
        if found.n:
            yield found

    def all_maps(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the maps of a log in its journal and in memory, without damaged ones."""
        for found in self.read_all(name):
            yield from whole_maps(found.data, found.n)[0]

    def unlink(self) -> None:
        """Remove the file, its journals and its spool, as all rows are stored."""
        claims = [stem.with_name(f"{stem.name}{FLIGHT_SUFFIX}") for stem in self._stems]
        for path in (*self.journals.values(), *claims, self.path):
            # It is not there, or in a folder that became read-only: stored rows are not stored again.
            with contextlib.suppress(OSError):
                path.unlink()

        for folder in self._spools:
            shutil.rmtree(folder, ignore_errors=True)

    def _journaled(self, name: str) -> Iterator[RowSlice]:
        path = self.journals.get(name)
        return read_journal(path) if path is not None else iter(())

    def read_from(self, name: str, start: int = 0) -> RowSlice:
        """Return the rows of a table or log in memory from `start` on, as bytes for a frame."""
        if name not in self._tables:
            return RowSlice(start, 0, b"")

        if isinstance(TABLES.get(name), Table):
            first, data = self.rows(name, start)
            return RowSlice(first, len(data) // self._tables[name][1].row_bytes, data)

        rows, ends = self._walk(name)
        base = self.counters(name).base
        if (count := self.counters(name).appended - base) > len(rows):
            text = "flight file %s: %d of the %d rows of its log %r are damaged or behind a damaged one"
            _log.warning(text, self.path, count - len(rows), count, name)

        first = min(max(start - base, 0), len(rows))
        offset = self._tables[name][1].offset
        return RowSlice(base + first, len(rows) - first, self._data[offset + ends[first] : offset + ends[-1]])

    def _walk(self, name: str) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the maps of a log in memory up to a damaged one, and the offset after each, from 0."""
        _, extent = self._tables[name]
        counters = self.counters(name)
        data = self._data[extent.offset : extent.offset + extent.capacity]
        return whole_maps(data, counters.appended - counters.base)

    def _read_identity(self) -> dict[str, Any]:
        place = self._prologue[5] & 1
        start, length = IDENTITY_AT[place], self._prologue[6 + place]
        found = unpacked_header(self.path, self._data[start : start + length])
        if not isinstance(found, dict):
            raise damaged(self.path, "its identity is not a map")

        return found


def read_flight(path: Path, runs_dir: Path | None = None) -> FlightSnapshot:
    """Read a dead rank's flight file.

    Raises:
        StoreError: it cannot be read, is damaged, has another version, or its owner is still running.
    """
    if own_mapping(path) is not None:
        raise _still_alive(path)

    try:
        with opened_trusted(path) as descriptor:
            if is_locked(descriptor):
                raise _still_alive(path)

            return FlightSnapshot(path, _read_all(descriptor), runs_dir)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"flight file {path} cannot be read: {error.strerror}") from error


def flight_identity(path: Path) -> dict[str, Any]:
    """Return the identity in a flight file's header, also where the tables are of another version; empty if unknown."""
    try:
        with opened_trusted(path) as descriptor:
            data = os.pread(descriptor, DATA_AT, 0)

        prologue = _prologue(path, data)
        place = prologue[5] & 1
        found = msgpack.unpackb(data[IDENTITY_AT[place] :][: prologue[6 + place]], strict_map_key=False)
        return found if isinstance(found, dict) else {}
    except (StoreError, OSError, *UNREADABLE):
        return {}


def may_be_of(identity: Mapping[str, Any], run_id: str) -> bool:
    """Return whether the rank that wrote a flight file is of a run, or has never learned its run.

    The memory of a host has the files of every runs folder, and other folders have jobs of the same name.
    """
    run_dir = identity.get("run_dir")
    return not run_dir or Path(str(run_dir)).name == run_id


def _is_own_folder(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        check_trusted_folder(folder)
        return True

    return False


def _is_regular(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)

    return False


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
        raise damaged(path, "its header is incomplete")

    prologue = PROLOGUE.unpack_from(data)
    if prologue[1] != VERSION:
        raise StoreError(
            f"flight file {path} has format {prologue[1]}, this traceml reads {VERSION}. "
            "Read it with the version that wrote it, or delete it."
        )

    if len(data) < prologue[2] and len(data) != DATA_AT:  # a crash appends text
        raise damaged(path, f"it is truncated: {len(data)} of {prologue[2]} bytes")

    return prologue


def _still_alive(path: Path) -> StoreError:
    return StoreError(f"flight file {path} belongs to a running process; it can be read after the process ends.")
