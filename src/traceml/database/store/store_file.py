"""File of the store: its SQL tables, opening, and error messages for SQLite errors."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgpack

from traceml.database.schema import TABLES
from traceml.database.store.filesystem import network_filesystem
from traceml.errors import StoreError, StoreVersionError
from traceml.run_folder import size_limit_text

__all__ = ["STORE_VERSION", "create", "last_written_s", "open_for_reading", "open_for_writing", "translate_errors"]

STORE_VERSION = 3
_APPLICATION_ID = 0x54524D4C  # "TRML"
_NEEDS_ROLLBACK = 776  # SQLITE_READONLY_ROLLBACK
_BUSY_MS = 5000
_MAX_VALUE_BYTES = 256 << 20  # as frames after decompression; see codec
_log = logging.getLogger("traceml")
# With 4 kB pages a frame over 1 kB spills into overflow pages and wastes up to 43 %.
_PAGE_BYTES = 32768

# Frames of one (stream, table) never overlap and are inserted in order of seq, from 0. So sum(n + thinned) rows were
# stored, max(seq + n + thinned) is the next one, and the difference is lost: no separate count can go wrong.
# Frames may be merged into the last of them. `thinnings` has how many old rows were removed of a frame.
# Frames of which nothing was left are gone: `emptied` has how many rows they had, and the number after the last.
# `spool` has rows of a large job that are not frames yet.
# `summaries` has the sums of the rows below `next_seq`, which are those in frames up to `after_id`.
_DDL = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tables (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, layout BLOB NOT NULL);
CREATE TABLE streams (
    id INTEGER PRIMARY KEY, rank INTEGER NOT NULL, attempt INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    start_ticks INTEGER NOT NULL, recorder TEXT NOT NULL, facts BLOB NOT NULL,
    UNIQUE (rank, attempt, host, pid, start_ticks, recorder)
);
CREATE TABLE frames (
    id INTEGER PRIMARY KEY, stream INTEGER NOT NULL, tbl INTEGER NOT NULL, seq INTEGER NOT NULL, n INTEGER NOT NULL,
    first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, codec INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE INDEX frames_by_table ON frames (tbl);
CREATE TABLE events (id INTEGER PRIMARY KEY, epoch_ns INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE thinnings (id INTEGER PRIMARY KEY, thinned INTEGER NOT NULL);
CREATE TABLE summaries (
    tbl INTEGER NOT NULL, stream INTEGER NOT NULL, next_seq INTEGER NOT NULL, after_id INTEGER NOT NULL,
    data BLOB NOT NULL, UNIQUE (tbl, stream)
);
CREATE TABLE emptied (
    tbl INTEGER NOT NULL, stream INTEGER NOT NULL, rows INTEGER NOT NULL, next_seq INTEGER NOT NULL,
    PRIMARY KEY (tbl, stream)
) WITHOUT ROWID;
CREATE TABLE spool (id INTEGER PRIMARY KEY, codec INTEGER NOT NULL, data BLOB NOT NULL);
"""


@contextmanager
def translate_errors(path: Path, doing: str) -> Iterator[None]:
    """Convert SQLite errors to a StoreError that names the file and the remedy.

    Args:
        doing: the action that failed, as in "cannot {doing} the run's store".
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the driver cannot decode damaged text
        raise StoreError(f"cannot {doing} the run's store {path}: {error}. {_advice(path, error, doing)}") from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise

        raise StoreError(f"cannot {doing} the run's store {path}: {error.strerror or error}.") from error


def create(path: Path) -> None:
    """Create an empty store under a temporary name, then rename it. The caller has locked the folder.

    Raises:
        StoreError: the folder is not writable, or the disk is full.
    """
    half = path.with_name(f"{path.name}.new-{os.getpid()}")
    with translate_errors(path, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_drafts(path)  # left by killed writers
        try:
            _build(half)
            half.replace(path)
        except BaseException:
            _remove_drafts(path)
            raise


def _remove_drafts(path: Path) -> None:
    for leftover in path.parent.glob(f"{path.name}.new-*"):
        leftover.unlink(missing_ok=True)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open a store for its only writer; create it if missing.

    Raises:
        StoreError: see `translate_errors`; also when it is not a store, or has another version.
    """
    if not path.exists() or path.stat().st_size == 0:
        create(path)

    with translate_errors(path, "open"):
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _check(database, path)
            _check_layouts(database, path)
            database.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
            _choose_journal(database, path)
            database.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            database.close()
            raise

    return database


def _choose_journal(database: sqlite3.Connection, path: Path) -> None:
    """Use a write-ahead log, except on a network filesystem, where readers on other hosts would read damaged pages.

    Its index is a file that all processes map: some filesystems cannot.
    """
    network = network_filesystem(path)
    if network is None and _can_map(path.with_name(f"{path.name}.new-{os.getpid()}")):
        database.execute("PRAGMA journal_mode=WAL")
        return

    _log.warning(
        "%s is on a %s: its store is written without a write-ahead log, which takes longer. "
        "A runs_dir on a local disk avoids that",
        path.parent,
        "filesystem that maps no files" if network is None else f"network filesystem ({network})",
    )
    try:
        database.execute("PRAGMA journal_mode=PERSIST")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):  # its log is in use: it stays until the next start
            raise


def _can_map(probe: Path) -> bool:
    """Whether processes can share memory by a file in this folder.

    Args:
        probe: a file to create for that, and remove.
    """
    try:
        with probe.open("w+b") as file:
            file.truncate(1)
            mmap.mmap(file.fileno(), 1).close()
    except OSError as error:
        return error.errno != errno.ENODEV  # others, as of a full disk, are the store's, too
    finally:
        probe.unlink(missing_ok=True)

    return True


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a store read-only; another process may be writing it.

    Raises:
        StoreError: the file is missing, damaged, not a store, or has another version.
    """
    if not path.is_file():
        raise StoreError(f"there is no run's store at {path}.")

    with translate_errors(path, "read"):
        try:
            return _connect_reader(path, "mode=ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == _NEEDS_ROLLBACK:
                _roll_back(path)
                return _connect_reader(path, "mode=ro")

            # Read-only media: SQLite cannot create its -shm file there, and there is no writer.
            if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
                raise

            return _connect_reader(path, "immutable=1")


def _roll_back(path: Path) -> None:
    """Undo a transaction in which a writer was killed, which a reader may not.

    Not on a network filesystem: it may not show the lock of a writer that lives on another host.

    Raises:
        StoreError: it has to be done on the writer's host.
    """
    if network_filesystem(path) is not None:
        raise StoreError(
            f"the run's store {path} is being written, or its writer was killed while it wrote. If no aggregator is "
            "running, `traceml sync` on the host of the last one makes it readable."
        )

    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)) as database:
        database.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        database.execute("PRAGMA schema_version").fetchone()


def _connect_reader(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?{mode}"
    database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        database.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        _check(database, path)
    except BaseException:
        database.close()
        raise

    return database


def _build(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        # In one transaction, and without a log: one that cannot be merged on a full disk would be left under its name.
        database.execute("PRAGMA journal_mode=MEMORY")
        database.executescript(f"BEGIN; {_DDL}")
        database.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version={STORE_VERSION}")
        layouts = [(name, msgpack.packb(table.layout)) for name, table in TABLES.items()]
        database.executemany("INSERT INTO tables (name, layout) VALUES (?, ?)", layouts)
        database.execute("COMMIT")


def _check(database: sqlite3.Connection, path: Path) -> None:
    if not path.stat().st_size and not database.execute("PRAGMA schema_version").fetchone()[0]:
        raise StoreError(f"{path} is an empty file: its content was lost, or a copy of it was cut off. Move it away.")

    application = database.execute("PRAGMA application_id").fetchone()[0]
    if application != _APPLICATION_ID:
        raise StoreError(f"{path} is a database, but not a traceml store. Move it away, or choose another folder.")

    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version != STORE_VERSION:  # first: a later format may have what this one never has
        raise StoreVersionError(path, version, STORE_VERSION)

    _check_schema(database, path)


def _check_schema(database: sqlite3.Connection, path: Path) -> None:
    """Refuse a store with programs in it: a view under a table's name may never end, and triggers run when we write.

    Values of gigabytes, for which a file needs no more than holes, are refused when they are read.
    """
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
    database.execute("PRAGMA trusted_schema=OFF")
    found = database.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchone()
    if found is not None:
        raise StoreError(
            f"{path} has the {found[0]} {found[1]!r:.80}, which no traceml has written: the file was changed. "
            "Do not open it with other programs; move it away."
        )


def last_written_s(path: Path) -> float | None:
    """Return the time of the last write to a store, in epoch seconds; None if there is none."""
    written_s = []
    for file in (path, path.with_name(f"{path.name}-wal")):
        with suppress(OSError):  # the log goes when its writer closes it
            written_s.append(file.stat().st_mtime)

    return max(written_s, default=None)


def _check_layouts(database: sqlite3.Connection, path: Path) -> None:
    stored = dict(database.execute("SELECT name, layout FROM tables"))
    for name, table in TABLES.items():
        if stored.get(name) != msgpack.packb(table.layout):
            raise StoreError(
                f"the run's store {path} has table {name!r} with other columns than this version of traceml writes. "
                "Start a new run."
            )


def _advice(path: Path, error: Exception, doing: str) -> str:
    text = str(error)
    if "disk I/O" in text and (limit := size_limit_text()) is not None:
        return f"{limit}; unwritten rows are kept while their jobs run."

    if "full" in text or "disk I/O" in text:
        kept = "unwritten rows are kept while their jobs run, and written later"
        return f"Free some space on the disk of {path.parent}; {kept}."

    if any(word in text for word in ("malformed", "not a database", "decode")):
        return "The file is damaged: move it away, or put a copy of it in its place."

    if "locked" in text and doing == "create":  # nobody else knows the file
        return f"The filesystem of {path.parent} cannot lock files: choose a runs_dir on another one."

    if "locked" in text:
        return "Another program has it locked: stop it, or wait."

    if "closed" in text:
        return "It is already closed."

    return "Check that the folder exists and is readable and writable."
