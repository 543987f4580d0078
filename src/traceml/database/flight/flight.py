"""Flight file: a rank's tables in a small memory-backed file that outlives the process.

One process maps the file. SIGKILL, the OOM killer or a segfault end the process but not its pages: `read_flight` still
reads the last rows, and the step and phase that were open.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
from pathlib import Path
from typing import Any

from traceml.clock import boot_id, machine_name, process_start_ticks
from traceml.database.flight.flight_folders import FLIGHT_SUFFIX, default_folder, disk_folders, spool_folder
from traceml.database.flight.flight_header import COUNTERS_AT, DATA_AT, FlightHeader, FolderClaim, MappedFile
from traceml.database.flight.journal import Journal, journal_path
from traceml.database.flight.journaled_tables import JournaledLog, JournaledRing, NameTable
from traceml.database.flight.row_rings import COUNTERS_PER_TABLE, ByteLog, Ring
from traceml.database.schema import JOURNALED, LOGS, METRICS, NAMES, PACKED, STEPS, USER_TABLES, Log, Slot, Table
from traceml.run_folder import size_limit_text
from traceml.trusted_files import make_trusted_folder

__all__ = ["FlightFile"]

_FREE_SHARE = 16
_FLOOR_ROWS = {STEPS.name: 4096}
_OTHER_FLOOR_ROWS = 256
_ALIGN = 64
_log = logging.getLogger("traceml")
_warned: set[str] = set()


class FlightFile:
    """All tables of one rank in one mapping. `create` makes it.

    Attributes:
        path: the file, None when it is anonymous memory.
        open_slots: int64 words for what is open now: one per `Phase`, then one per `Slot`.
        journal_stems: paths without suffix for files on disk; the first whose folder is writable is used.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        capacities: dict[str, int],
        identity: dict[str, Any],
        file: MappedFile | None = None,
        stems: tuple[Path, ...] = (),
    ) -> None:
        self.path = file.path if file is not None else None
        self.journal_stems = stems
        self._file, self._memory, self._pid = file, memory, os.getpid()
        self._claims: dict[Path, FolderClaim] = {}
        self._header = FlightHeader(memory)
        self._words, self.open_slots = self._header.words, self._header.open_slots
        self.rings: dict[str, Ring] = {}
        self.logs: dict[str, ByteLog] = {}
        layout = self._lay_out_tables(capacities)
        names, metrics = self.logs[NAMES.name], self.rings[METRICS.name]
        assert isinstance(names, JournaledLog)
        assert isinstance(metrics, JournaledRing)
        self.names, self.metrics = NameTable(names), metrics
        metrics.before_spill = names.save
        self._header.begin(layout, identity)

    def __repr__(self) -> str:
        where = str(self.path) if self.path else "memory"
        return f"FlightFile({where!r}, {len(self._memory)} bytes, pid={self.identity.get('pid')})"

    @classmethod
    def create(
        cls,
        folder: Path | None,
        identity: dict[str, Any],
        *,
        capacities: dict[str, int] | None = None,
        runs_dir: Path | None = None,
    ) -> FlightFile:
        """Create this process's flight file, or plain memory where no folder has room for it.

        It takes at most 1/16 of the free space of the filesystem and reserves all of it now: a page that is missing
        later would end the process with SIGBUS. A folder without space or permission raises nothing; the replacement
        is logged once as a warning.

        Args:
            folder: its folder, `default_folder()` when None; created if missing, must belong to this user alone.
            identity: further facts about the writer (rank, attempt, job, host); pid, start and boot are added.
            capacities: rows per table where they differ from the schema's; rounded up to a power of two.
            runs_dir: the runs folder, where it is tried next; journals go there too.

        Raises:
            OSError: plain memory cannot be allocated either.
            ValueError: `capacities` names a table that does not exist.
        """
        wanted = _table_capacities(capacities or {})
        pid = os.getpid()
        full = {"pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id(), "machine": machine_name()}
        # `os.execv` keeps pid and start time, so the name has a random part.
        stem = f"{pid}-{full['start_ticks']}-{os.urandom(4).hex()}"
        stems = tuple(place / stem for place in disk_folders(runs_dir))
        places = [folder or default_folder(), *([stems[0].parent] if runs_dir is not None else [])]
        refusals: list[str] = []
        for place in places:
            try:
                flight = cls._in_folder(place, wanted, full | identity, stems)
            except OSError as error:
                refusals.append(f"{place}: {error.strerror or error}")
                continue

            _warn_once(refusals, place)
            return flight

        _warn_once(refusals, None)
        return cls(mmap.mmap(-1, _file_bytes(wanted)), wanted, full | identity, None, stems)

    def ring(self, name: str) -> Ring:
        """Return the ring of a packed table."""
        return self.rings[name]

    def log(self, name: str) -> ByteLog:
        """Return a log."""
        return self.logs[name]

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about the writer."""
        return self._header.identity

    def update_identity(self, **fields: Any) -> None:
        """Change the facts about the writer."""
        self._header.update_identity(**fields)
        for claim in self._claims.values():
            claim.update_identity(**fields)

    def beat(self, now_ns: int) -> None:
        """Note that this process lives."""
        self.open_slots[Slot.HEARTBEAT] = now_ns
        for claim in self._claims.values():
            claim.beat(now_ns)

    def claim(self, folder: Path) -> None:
        """Leave the writer's identity in a folder on disk that gets files of this process: a reboot empties memory."""
        if folder in self._claims or (self.path is not None and self.path.parent == folder):
            return

        with contextlib.suppress(OSError):  # without it the files are found by the flight file only
            path = folder / f"{self.journal_stems[0].name}{FLIGHT_SUFFIX}"
            self._claims = self._claims | {folder: FolderClaim(path, self.identity)}

    @property
    def staging_folder(self) -> Path | None:
        """Folder in memory, next to this file, of logged files that are not copied yet; None without memory."""
        if self.path is None or self.path.parent in {stem.parent for stem in self.journal_stems}:
            return None

        return spool_folder(self.path.with_suffix(""))

    @property
    def journaled(self) -> list[JournaledRing | JournaledLog]:
        """The tables whose rows are never evicted."""
        return [
            table
            for table in (*self.rings.values(), *self.logs.values())
            if isinstance(table, JournaledRing | JournaledLog)
        ]

    @property
    def holds_user_rows(self) -> bool:
        """Whether it has rows logged by the user that are not stored yet."""
        return any(table.acked < table.appended for table in self.journaled if table.name in USER_TABLES)

    @property
    def descriptor(self) -> int | None:
        """Descriptor of the file, to whose end a crash may append text; None in plain memory."""
        return self._file.descriptor if self._file is not None and self._file.descriptor >= 0 else None

    def close(self, *, unlink: bool) -> None:
        """Close the file. The mapping stays while something refers to it, so a late append does no harm.

        In a forked child it does nothing: the file belongs to the parent.

        Args:
            unlink: remove the file, as all rows are stored; else it stays for a later reader.
        """
        if self._pid != os.getpid():
            return

        for table in self.journaled:
            table.journal.close(unlink=unlink)

        for claim in self._claims.values():
            claim.close(unlink=unlink)

        if self._file is not None:
            self._file.close(unlink=unlink)

    @classmethod
    def _in_folder(
        cls, folder: Path, wanted: dict[str, int], identity: dict[str, Any], stems: tuple[Path, ...]
    ) -> FlightFile:
        make_trusted_folder(folder)
        capacities = _shrink_to_fit(wanted, _free_bytes(folder) // _FREE_SHARE)
        file = MappedFile(folder / f"{stems[0].name}{FLIGHT_SUFFIX}", _file_bytes(capacities))
        try:
            return cls(file.memory, capacities, identity, file, stems)
        except BaseException:
            file.close(unlink=True)
            raise

    def _lay_out_tables(self, capacities: dict[str, int]) -> list[list[Any]]:
        layout: list[list[Any]] = []
        offset = DATA_AT
        tables: tuple[Table | Log, ...] = (*PACKED, *LOGS)
        for index, table in enumerate(tables):
            capacity = capacities[table.name]
            slot = COUNTERS_AT // 8 + index * COUNTERS_PER_TABLE
            row_bytes = table.row_bytes if isinstance(table, Table) else 1
            where = (self._memory, offset, capacity, self._words, slot)
            if isinstance(table, Table):
                kept = table.name in JOURNALED
                self.rings[table.name] = (
                    JournaledRing(table, *where, self._journal(table)) if kept else Ring(table, *where)
                )
            elif table.name in JOURNALED:
                self.logs[table.name] = JournaledLog(table, *where, self._journal(table))
            else:
                self.logs[table.name] = ByteLog(table, *where)

            layout.append([table.name, offset, capacity, row_bytes, table.layout])
            offset += _aligned(capacity * row_bytes)

        return layout

    def _journal(self, table: Table | Log) -> Journal:
        places = [journal_path(stem, table.name) for stem in self.journal_stems]
        return Journal(*places, keep=table is NAMES, on_create=self.claim)


def _table_capacities(overrides: dict[str, int]) -> dict[str, int]:
    """Return rows (bytes for logs) per table, before the free space is known."""
    capacities = {table.name: table.capacity for table in PACKED} | {log.name: log.capacity_bytes for log in LOGS}
    for name, capacity in overrides.items():
        if name not in capacities:
            raise ValueError(f"no table {name!r} in the flight file; there are {', '.join(capacities)}")

        capacities[name] = 1 << max(1, (capacity - 1).bit_length())

    return capacities


def _shrink_to_fit(wanted: dict[str, int], budget_bytes: int) -> dict[str, int]:
    """Halve the largest ring until all fit the budget; no ring gets smaller than its minimum."""
    capacities = dict(wanted)
    while _file_bytes(capacities) > budget_bytes:
        able = [t for t in PACKED if capacities[t.name] > _FLOOR_ROWS.get(t.name, _OTHER_FLOOR_ROWS)]
        if not able:
            raise OSError(errno.ENOSPC, f"needs {_file_bytes(capacities)} bytes, may take {budget_bytes} (1/16 of it)")

        largest = max(able, key=lambda table: capacities[table.name] * table.row_bytes)
        capacities[largest.name] //= 2

    return capacities


def _file_bytes(capacities: dict[str, int]) -> int:
    rings = sum(_aligned(capacities[table.name] * table.row_bytes) for table in PACKED)
    return DATA_AT + rings + sum(_aligned(capacities[log.name]) for log in LOGS)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _warn_once(refusals: list[str], place: Path | None) -> None:
    if not refusals:
        return

    text = f"no flight file in {'; '.join(refusals)}. " + (
        f"Using {place}: the last rows survive a killed process, a step may stall for a millisecond occasionally."
        if place
        else "Using plain memory: the last rows of a killed process will be lost. "
        + (size_limit_text() or "To keep them, give one of these folders to this user, with some space")
        + "."
    )
    if text not in _warned:
        _warned.add(text)
        _log.warning(text)
