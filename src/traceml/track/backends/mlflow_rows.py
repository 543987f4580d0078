"""Rows as MLflow keeps them: set apart where it would take two for one, and put into a database file many at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Apart", "Row", "insert", "is_insertable"]

# Rows of the last millisecond that are remembered over a restart, to set repeated ones apart again.
_REMEMBERED = 256
# The table of metrics as we know it: with another one, MLflow's own call is used.
_COLUMNS = frozenset({"run_uuid", "key", "value", "timestamp", "step", "is_nan"})


class Row(NamedTuple):
    """A value as MLflow takes it; `timestamp` in milliseconds since the epoch."""

    key: str
    value: float
    timestamp: int
    step: int


class _Stored(NamedTuple):
    """A value as MLflow's tables hold it: neither NaN nor infinities."""

    run_uuid: str
    key: str
    value: float
    timestamp: int
    step: int
    is_nan: bool


class Apart:
    """Sets rows apart that MLflow would take for one: same name, value, step and millisecond.

    What it decides is a pure function of the rows since the start, so a replay decides the same.

    Args:
        last: what `last` returned before a restart.
    """

    def __init__(self, last: Sequence[tuple[Any, ...]] = ()) -> None:
        self._kept: list[tuple[Any, ...]] = list(last)  # (time of the call, what was sent for it)
        self._new: list[tuple[Any, ...]] = []

    def set_apart(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows, repeated ones each a millisecond later than the one before."""
        self._new = []
        seen = {tuple(sent) for _, *sent in self._kept}
        result = []
        for key, value, stamp, step in rows:
            # NaN is not equal to itself and would not be found; JSON has none of these.
            same = value if math.isfinite(value) else repr(value)
            at = stamp
            while (key, same, at, step) in seen:
                at += 1

            seen.add((key, same, at, step))
            self._new.append((stamp, key, same, at, step))
            result.append(Row(key, value, at, step))

        return result

    def keep(self) -> None:
        """Take what was set apart last as sent; only rows of its last moment can still be repeated."""
        if not self._new:
            return

        latest = max(stamp for stamp, *_ in self._new)
        self._kept = [each for each in (*self._kept, *self._new) if each[0] >= latest - 1][-_REMEMBERED:]
        self._new = []

    def last(self) -> list[list[Any]]:
        """Return what a new process must know."""
        return [list(each) for each in self._kept]


def is_insertable(store: Any) -> bool:
    """Whether an MLflow store is a database file whose tables are those that `insert` knows."""
    if getattr(store, "db_type", None) != "sqlite" or not hasattr(store, "_update_latest_metrics_if_necessary"):
        return False

    from mlflow.store.tracking.dbmodels.models import SqlMetric

    return frozenset(SqlMetric.__table__.columns.keys()) == _COLUMNS


def insert(store: Any, run_id: str, rows: Sequence[Row]) -> None:
    """Put rows into a database file in one transaction; those that are there already stay as they are.

    What the store's `log_batch` does, which makes an object of its mapper for each row and takes ten times as long.
    """
    from mlflow.store.tracking.dbmodels.models import SqlMetric
    from sqlalchemy.dialects import sqlite

    stored = [_stored(store, run_id, row) for row in rows]
    with store.ManagedSessionMaker(read_only=False) as session:
        store._check_run_is_active(store._get_run(run_uuid=run_id, session=session))
        statement = sqlite.insert(SqlMetric.__table__).on_conflict_do_nothing()
        session.connection().execute(statement, [row._asdict() for row in stored])
        store._update_latest_metrics_if_necessary(_newest(stored), session)


def _stored(store: Any, run_id: str, row: Row) -> _Stored:
    is_nan, value = (False, row.value) if math.isfinite(row.value) else store.sanitize_metric_value(row.value)
    return _Stored(run_id, row.key, value, row.timestamp, row.step, is_nan)


def _newest(rows: Sequence[_Stored]) -> list[_Stored]:
    """Return of each name the row that MLflow shows as its value."""
    newest: dict[str, _Stored] = {}
    for row in rows:
        known = newest.get(row.key)
        if known is None or (row.step, row.timestamp, row.value) > (known.step, known.timestamp, known.value):
            newest[row.key] = row

    return list(newest.values())
