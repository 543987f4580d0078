"""Flight file: a rank's tables in a small memory-backed file that outlives the process.

One process maps the file. SIGKILL, the OOM killer or a segfault end the process but not its pages: `read_flight` still
reads the last rows, and the step and phase that were open.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import mmap
import os
import stat
import time
from pathlib import Path
from typing import Any

import msgpack

from traceml.clock import boot_id, monotonic_ns, process_start_ticks
from traceml.database.journal import journal_path
from traceml.database.journaled import JournaledLog, JournaledRing, NameTable
from traceml.database.postmortem import (
    COUNTERS_AT,
    DATA_AT,
    FLIGHT_SUFFIX,
    IDENTITY_AT,
    IDENTITY_BYTES,
    LAYOUT_AT,
    LAYOUT_BYTES,
    MAGIC,
    OPEN_SLOTS_AT,
    OWN_FILES,
    PROLOGUE,
    VERSION,
)
from traceml.database.rings import COUNTERS_PER_TABLE, ByteLog, Ring, pack_map
from traceml.database.schema import JOURNALED, LOGS, METRICS, NAMES, PACKED, STEPS, USER_TABLES, Log, Slot, Table

__all__ = ["COPIES_FOLDER", "FALLBACK_FOLDER", "FlightFile", "default_folder"]

# In the runs folder: flight files of ranks without room in memory.
FALLBACK_FOLDER = ".flights"
# In a run's folder: copies of flight files from other hosts.
COPIES_FOLDER = "flights"
_FREE_SHARE = 16
_FLOOR_ROWS = {STEPS.name: 4096}
_OTHER_FLOOR_ROWS = 256
_ALIGN = 64
_serial = itertools.count()
_log = logging.getLogger("traceml")
_warned: set[str] = set()


def default_folder() -> Path:
    """Return the memory-backed folder of this user's flight files on this host."""
    return Path(f"/dev/shm/traceml-{os.geteuid()}")  # noqa: S108 - ownership and mode are checked before use


class FlightFile:
    """All tables of one rank in one mapping. `create` makes it.

    Attributes:
        path: the file, None when it is anonymous memory.
        identity: facts about the writer.
        open_slots: int64 words for what is open now: one per `Phase`, then one per `Slot`.
        rings, logs: the tables by name.
        metrics: the ring of logged values.
        names: ids of the names that rows use.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        capacities: dict[str, int],
        identity: dict[str, Any],
        path: Path | None,
        lock: int,
        journal: tuple[Path, ...] = (),
    ) -> None:
        self.path = path
        self._journal = journal
        self._memory, self._lock_descriptor, self._pid = memory, lock, os.getpid()
        view = memoryview(memory)
        self._words = view[: IDENTITY_AT[0]].cast("q")
        self.open_slots = view[OPEN_SLOTS_AT:COUNTERS_AT].cast("q")
        self.open_slots[Slot.STEP] = -1
        self.rings: dict[str, Ring] = {}
        self.logs: dict[str, ByteLog] = {}
        layout = self._lay_out_tables(capacities)
        names = self.logs[NAMES.name]
        assert isinstance(names, JournaledLog)
        self.names = NameTable(names)
        metrics = self.rings[METRICS.name]
        assert isinstance(metrics, JournaledRing)
        self.metrics = metrics
        self.identity: dict[str, Any] = {}
        self._write_header(layout, len(memory))
        self.update_identity(**identity)
        memory[: len(MAGIC)] = MAGIC  # last: a file without it is incomplete

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
        fallback: Path | None = None,
    ) -> FlightFile:
        """Create this process's flight file, or plain memory where no folder has room for it.

        It takes at most 1/16 of the free space of the filesystem and reserves all of it now: a page that is missing
        later would end the process with SIGBUS. A folder without space or permission raises nothing; the replacement
        is logged once as a warning.

        Args:
            folder: its folder, `default_folder()` when None; created if missing, must belong to this user alone.
            identity: further facts about the writer (rank, attempt, job, host); pid, start and boot are added.
            capacities: rows per table where they differ from the schema's; rounded up to a power of two.
            fallback: a folder on disk to try next, usually the runs folder; journals go there too.

        Raises:
            OSError: plain memory cannot be allocated either.
            ValueError: `capacities` names a table that does not exist.
        """
        wanted = _table_capacities(capacities or {})
        full = {"pid": os.getpid(), "start_ticks": process_start_ticks(os.getpid()), "boot_id": boot_id()} | identity
        stem = f"{full['pid']}-{full['start_ticks']}-{next(_serial)}"
        # On disk: a journal takes what memory has no room for.
        temporary = Path(os.environ.get("TMPDIR") or "/tmp", f"traceml-{os.geteuid()}")  # noqa: S108 - see journal
        journal = tuple(folder.absolute() / stem for folder in (fallback, temporary) if folder is not None)
        full["journal"] = [str(place) for place in journal]
        refusals: list[str] = []
        for place, private in ((folder or default_folder(), True), (fallback, False)):
            if place is None:
                continue

            try:
                flight = cls._in_folder(place, private, wanted, full, journal)
            except OSError as error:
                refusals.append(f"{place}: {error.strerror or error}")
                continue

            _warn_once(refusals, place)
            return flight

        _warn_once(refusals, None)
        return cls(mmap.mmap(-1, _file_bytes(wanted)), wanted, full, None, -1, journal)

    def ring(self, name: str) -> Ring:
        """Return the ring of a packed table."""
        return self.rings[name]

    def log(self, name: str) -> ByteLog:
        """Return a log."""
        return self.logs[name]

    def update_identity(self, **fields: Any) -> None:
        """Change the facts about the writer. The old copy stays valid until the switch is complete."""
        self.identity = self.identity | fields
        packed = _pack_to_fit(self.identity, IDENTITY_BYTES)
        spare = 1 - (self._words[5] & 1)
        start = IDENTITY_AT[spare]
        self._memory[start : start + len(packed)] = packed
        self._words[6 + spare] = len(packed)
        self._words[5] = spare

    @property
    def journaled(self) -> list[JournaledRing | JournaledLog]:
        """The tables whose rows are never evicted."""
        return [
            table
            for table in (*self.rings.values(), *self.logs.values())
            if isinstance(table, JournaledRing | JournaledLog)
        ]

    @property
    def journal_stems(self) -> tuple[Path, ...]:
        """Paths without suffix for files on disk that belong to this one; the first writable folder is used."""
        return self._journal

    @property
    def holds_user_rows(self) -> bool:
        """Whether it has rows logged by the user that are not stored yet."""
        return any(table.acked < table.appended for table in self.journaled if table.name in USER_TABLES)

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

        if self.path is None or self._lock_descriptor < 0:
            return

        if unlink:
            self.path.unlink(missing_ok=True)

        status = os.fstat(self._lock_descriptor)
        OWN_FILES.pop((os.getpid(), status.st_dev, status.st_ino), None)
        os.close(self._lock_descriptor)  # drops the lock
        self._lock_descriptor = -1

    @classmethod
    def _in_folder(
        cls, folder: Path, private: bool, wanted: dict[str, int], identity: dict[str, Any], journal: tuple[Path, ...]
    ) -> FlightFile:
        _prepare_folder(folder, private)
        capacities = _shrink_to_fit(wanted, _free_bytes(folder) // _FREE_SHARE)
        path = folder / f"{journal[0].name}{FLIGHT_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = _file_bytes(capacities)
            os.posix_fallocate(descriptor, 0, size)
            # mmap duplicates the descriptor. It must live as long as the lock, which closing any descriptor would drop.
            memory = mmap.mmap(descriptor, size)
            flight = cls(memory, capacities, identity, path, descriptor, journal)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise

        status = os.fstat(descriptor)
        OWN_FILES[(os.getpid(), status.st_dev, status.st_ino)] = memory
        return flight

    def _lay_out_tables(self, capacities: dict[str, int]) -> list[list[Any]]:
        layout: list[list[Any]] = []
        offset = DATA_AT
        tables: tuple[Table | Log, ...] = (*PACKED, *LOGS)
        for index, table in enumerate(tables):
            capacity = capacities[table.name]
            slot = COUNTERS_AT // 8 + index * COUNTERS_PER_TABLE
            row_bytes = table.row_bytes if isinstance(table, Table) else 1
            where = (self._memory, offset, capacity, self._words, slot)
            journals = tuple(journal_path(stem, table.name) for stem in self._journal)
            if isinstance(table, Table):
                kept = table.name in JOURNALED
                self.rings[table.name] = JournaledRing(table, *where, journals) if kept else Ring(table, *where)
            elif table.name in JOURNALED:
                self.logs[table.name] = JournaledLog(table, *where, journals, keep=table is NAMES)
            else:
                self.logs[table.name] = ByteLog(table, *where)

            layout.append([table.name, offset, capacity, row_bytes, table.layout])
            offset += _aligned(capacity * row_bytes)

        return layout

    def _write_header(self, layout: list[list[Any]], size: int) -> None:
        packed = msgpack.packb(layout)
        if len(packed) > LAYOUT_BYTES:
            raise ValueError(f"the layout of the tables takes {len(packed)} bytes, {LAYOUT_BYTES} are reserved")

        self._memory[LAYOUT_AT : LAYOUT_AT + len(packed)] = packed
        now_ns, epoch_ns = monotonic_ns(), time.time_ns()
        PROLOGUE.pack_into(self._memory, 0, bytes(8), VERSION, size, now_ns, epoch_ns, 0, 0, 0, len(packed), 0)


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


def _prepare_folder(folder: Path, private: bool) -> None:
    """Create the folder; a private one must be a real folder of this user that nobody else can write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat() if private else folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    if private and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise PermissionError(
            errno.EPERM, "the folder belongs to another user, or others may write into it", str(folder)
        )


def _pack_to_fit(fields: dict[str, Any], limit: int) -> bytes:
    """Pack a map; leave out its longest value while it is too long."""
    kept = dict(fields)
    while len(packed := pack_map(kept)) > limit:
        del kept[max(kept, key=lambda key: len(pack_map({key: kept[key]})))]

    return packed


def _warn_once(refusals: list[str], place: Path | None) -> None:
    if not refusals:
        return

    text = f"no flight file in {'; '.join(refusals)}. " + (
        f"Using {place}: the last rows survive a killed process, a step may stall for a millisecond occasionally."
        if place
        else "Using plain memory: the last rows of a killed process will be lost. Free some space there to keep them."
    )
    if text not in _warned:
        _warned.add(text)
        _log.warning(text)
