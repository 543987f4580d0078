"""MLflow's database file: its schema is made in a copy, which is then renamed, so that it is never incomplete.

MLflow itself migrates in place, in many transactions. A process that is killed meanwhile leaves a file that neither
MLflow nor `mlflow db upgrade` can open ("table already exists").
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traceml.errors import BackendError

__all__ = ["prepare_database"]

_log = logging.getLogger("traceml")


def prepare_database(path: Path, *, is_ours: bool) -> None:
    """Create the database file, or bring its schema up to date; another delivery may do so at the same moment.

    A file whose creation was interrupted holds no run and is replaced. The replaced file stays next to it.

    Args:
        is_ours: whether traceml chose the file, and so may upgrade one that an older MLflow wrote.

    Raises:
        BackendError: its schema is of another version of MLflow and is not upgraded; the text has the command.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not path.exists() or not path.stat().st_size:
            _create(path)
        elif not _is_current(path):
            _repair(path, is_ours=is_ours)


def _create(path: Path) -> None:
    draft = _draft(path)
    with _draft_engine(draft) as engine:
        _utils()._initialize_tables(engine)

    _publish(draft, path)


def _repair(path: Path, *, is_ours: bool) -> None:
    """Replace a file of another schema by an upgraded copy, or by an empty one where it holds no run."""
    has_runs = _has_runs(path)
    command = f"`mlflow db upgrade sqlite:///{path}`"
    if has_runs and not is_ours:
        raise BackendError(f"run {command}: the MLflow database {path} has the schema of another version of MLflow")

    kept = _unused(path)
    draft = _draft(path)
    try:
        _copy(path, draft)
        with _draft_engine(draft) as engine:
            _utils()._upgrade_db(engine)
    except Exception as error:
        # Alembic's own error: a newer MLflow wrote the file.
        if has_runs or not _is_half_done(error):
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise BackendError(
                f"the MLflow database {path} cannot be upgraded to the installed MLflow ({why}): "
                f"install the version that wrote it, or try {command} on a copy, or move the file away"
            ) from error

        _log.warning("the creation of the MLflow database %s was interrupted; it is created again", path)
        _copy(path, kept)
        _create(path)
        return

    _log.warning("the MLflow database %s was upgraded; the earlier one is %s", path, kept)
    _copy(path, kept)
    _publish(draft, path)


def _is_half_done(error: Exception) -> bool:
    """Whether a step of the upgrade was done before: a process was killed between it and its record."""
    from sqlalchemy.exc import DatabaseError

    return isinstance(error, DatabaseError)


def _is_current(path: Path) -> bool:
    utils: Any = _utils()
    with _engine(path) as engine:
        is_newest = utils._get_schema_version(engine) == utils._get_latest_schema_revision()
        return bool(is_newest and utils._all_tables_exist(engine))


def _has_runs(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            return database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None
        except sqlite3.OperationalError:  # no such table
            return False


def _copy(path: Path, target: Path) -> None:
    """Copy a database, rolling back what a killed process left half written."""
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def _draft(path: Path) -> Path:
    """Return the file to work in, without what a killed process left of it."""
    draft = path.with_name(f".{path.name}.new")
    for left in (draft, draft.with_name(f"{draft.name}-journal")):
        left.unlink(missing_ok=True)

    return draft


def _publish(draft: Path, path: Path) -> None:
    """Rename a draft once the disk holds all of it."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())

    draft.replace(path)


def _unused(path: Path) -> Path:
    """Return a name next to the file for the earlier one."""
    names = (path.with_name(f"{path.name}.before-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _utils() -> Any:
    from mlflow.store.db import utils

    return utils


@contextlib.contextmanager
def _engine(path: Path) -> Iterator[Any]:
    engine = _utils().create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    try:
        yield engine
    finally:
        engine.dispose()


@contextlib.contextmanager
def _draft_engine(draft: Path) -> Iterator[Any]:
    """Return an engine that waits for no disk: MLflow's migrations wait for it a thousand times."""
    from sqlalchemy import event

    def set_up(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=MEMORY")

    with _engine(draft) as engine:
        event.listen(engine, "connect", set_up)
        engine.dispose()  # the connection that was made before
        yield engine


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time prepare a file; the kernel releases the lock when the process dies."""
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)

        yield
