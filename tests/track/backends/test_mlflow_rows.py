"""Rows in MLflow's own tables: put there directly, they are what its own call leaves."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.track.backends.mlflow_rows import (
    TESTED_VERSIONS,
    DuplicateShifter,
    MetricRow,
    RepeatedPaths,
    insert,
    is_insertable,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
NAMES = ["loss", "acc", *(f"n{number}" for number in range(600))]
ROWS = [
    *(MetricRow(name, number * 0.5, 1_700_000_000_000 + number, number % 7) for number, name in enumerate(NAMES * 2)),
    MetricRow("loss", math.nan, 5, 3),
    MetricRow("loss", math.inf, 6, 2**40),
    MetricRow("loss", -math.inf, 7, 2**40),
    MetricRow("acc", 3.0, 8, 1),
    MetricRow("acc", 3.0, 8, 1),  # the same again
]


def _contents(uri: str, run_id: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of both tables of a run."""
    import sqlite3

    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return {
            table: sorted(
                connection.execute(
                    f"SELECT key, value, timestamp, step, is_nan FROM {table} WHERE run_uuid = ?", [run_id]
                )
            )
            for table in ("metrics", "latest_metrics")
        }


def test_what_is_inserted_is_what_mlflow_would_have_stored(tmp_path: Path, empty_mlflow: Path) -> None:
    """Both tables, over several batches, one of which comes a second time, and with a run that has ended."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path / 'm.db')}"
    client = MlflowClient(uri)
    store = client._tracking_client.store
    experiment = client.create_experiment("one")
    theirs, ours = (client.create_run(experiment).info.run_id for _ in range(2))
    assert is_insertable(store)

    parts = [ROWS[:700], ROWS[700:], ROWS[600:800]]
    for part in parts:
        insert(store, ours, part)
        for first in range(0, len(part), 500):
            store.log_batch(theirs, [Metric(*row) for row in part[first : first + 500]], [], [])

    assert _contents(uri, ours) == _contents(uri, theirs)
    assert len(_contents(uri, ours)["metrics"]) == len(ROWS) - 1
    client.delete_run(ours)
    with pytest.raises(MlflowException, match="active"):
        insert(store, ours, ROWS[:1])


def test_other_tables_are_left_to_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's store has none; a database file of a version with another column is not written into."""
    from mlflow.store.tracking.dbmodels.models import SqlMetric

    store = SimpleNamespace(db_type="sqlite")
    assert is_insertable(store)
    assert not is_insertable(SimpleNamespace())
    assert not is_insertable(SimpleNamespace(db_type="postgresql"))
    table = SimpleNamespace(columns=dict.fromkeys((*SqlMetric.__table__.columns.keys(), "unit"), 0))
    monkeypatch.setattr(SqlMetric, "__table__", table)
    assert not is_insertable(store)


def test_only_tested_versions_are_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed version is one of them, so the comparison above holds it; any other goes through `log_batch`."""
    import mlflow.version

    assert mlflow.version.VERSION.rpartition(".")[0] in TESTED_VERSIONS
    monkeypatch.setattr(mlflow.version, "VERSION", "3.999.0")
    assert not is_insertable(SimpleNamespace(db_type="sqlite"))


def test_repeated_rows_are_set_apart_also_over_a_restart() -> None:
    """Each of the same again is a millisecond later; what was not kept is decided the same a second time."""
    shifter = DuplicateShifter()
    row = MetricRow("loss", 1.0, 100, 0)
    first = shifter.shift([row, row, MetricRow("loss", math.nan, 100, 0), MetricRow("loss", math.nan, 100, 0)])
    assert [each.timestamp for each in first] == [100, 101, 100, 101]
    assert shifter.shift([row]) == [row]  # the first batch failed: nothing of it counts
    shifter.commit()
    after = _restarted(shifter)
    assert after.shift([row]) == [MetricRow("loss", 1.0, 101, 0)]


@pytest.mark.parametrize("per_batch", [1, 7, 1000])
def test_repeated_rows_stay_apart_however_many_they_are(per_batch: int) -> None:
    """A flag that is logged five times a millisecond at one step, beside others, from threads, over restarts."""
    order = random.Random(per_batch)
    rows = [MetricRow("flag", 1.0, 1_000 + at // 5 - order.randrange(2), 0) for at in range(3_000)]
    others = [MetricRow(f"n{at % 300}", float(at), row.timestamp, at) for at, row in enumerate(rows)]
    given = [row for pair in zip(rows, others, strict=True) for row in pair]
    shifter, sent = DuplicateShifter(), []
    for first in range(0, len(given), per_batch):
        batch = given[first : first + per_batch]
        sent += shifter.shift(batch)
        assert shifter.shift(batch) == sent[first:]
        shifter.commit()
        shifter = _restarted(shifter)
        assert len(shifter.taken()) < 40

    assert [row for row in sent if row.key != "flag"] == others
    assert len(set(sent)) == len(given)


def _restarted(shifter: DuplicateShifter) -> DuplicateShifter:
    """Return the shifter of the next process, which has what a state file kept of this one."""
    return DuplicateShifter((tuple(series), spans) for series, spans in json.loads(json.dumps(shifter.taken())))


def test_another_content_gets_another_path() -> None:
    """The same content gets its own again, also in a new process; only the newest paths are remembered."""
    paths = RepeatedPaths()
    given = [("text/a/1", b"x"), ("text/a/1", b"y"), ("text/a/1", b"x"), ("text/a/2", b"y")]
    expected = ["text/a/1.txt", "text/a/1-2.txt", "text/a/1.txt", "text/a/2.txt"]
    assert [paths.path_of(stem, ".txt", content) for stem, content in given] == expected

    later = RepeatedPaths(json.loads(json.dumps(paths.recent())))
    assert [later.path_of(stem, ".txt", content) for stem, content in given] == expected
    for step in range(1000):
        later.path_of(f"text/b/{step}", ".txt", b"x")

    assert len(later.recent()) == 256
