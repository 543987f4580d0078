"""Losses that traceml reads itself, as a metric of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.track.fabricated import START_NS, LoggedRun
from traceml.database.schema import LOSSES
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.rows import metrics
from traceml.runs.rows.metric_series import MetricSeriesSet
from traceml.runs.rows.metrics import MetricSummary, is_hidden


@pytest.fixture
def run(tmp_path: Path) -> LoggedRun:
    return LoggedRun(tmp_path / "runs" / "r1")


def losses(run: LoggedRun, values: Sequence[float], *, rank: int = 0, first: int = 0) -> None:
    """Store losses that a rank's hooks have read, one a second."""
    rows = np.zeros(len(values), LOSSES.dtype)
    rows["step"] = np.arange(first, first + len(values))
    rows["t_ns"], rows["loss"] = rows["step"] * 10**9, values
    stream = run.stream(rank)
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        run.writer.append(stream, "losses", first + start, len(part), part.tobytes())

    run.writer.commit()


def test_the_loss_is_a_metric_without_logging(run: LoggedRun) -> None:
    """The report has it under a name of its own, with what is not finite left out; of other ranks it has none."""
    losses(run, [3.0, 1.0, math.nan, 2.0])
    losses(run, [9.0, 9.0], rank=1)
    run.metrics({"accuracy": [0.5]})

    report = build_report(run.end()).to_dict()

    assert report["metrics"]["traceml/loss"] == {"last": 2.0, "min": 1.0, "max": 3.0, "count": 4}
    assert set(report["metrics"]) == {"accuracy", "traceml/loss"}


def test_a_loss_that_the_training_logs_takes_its_place(run: LoggedRun) -> None:
    """One of validation does not."""
    losses(run, [3.0])
    run.metrics({"val_loss": [0.5]})
    run.writer.commit()
    assert "traceml/loss" in build_report(run.path).metrics

    run.metrics({"train/Loss": [3.0]})
    assert set(build_report(run.end()).metrics) == {"val_loss", "train/Loss"}


@pytest.mark.parametrize(
    ("names", "hidden"),
    [
        (["loss"], True),
        (["epoch_loss/rank_3"], True),
        (["eval_loss", "test/loss", "validation loss"], False),
        (["accuracy", "traceml/loss"], False),
    ],
)
def test_names_of_a_training_loss(names: list[str], hidden: bool) -> None:
    """Losses of evaluation, other metrics and its own name do not hide it."""
    assert is_hidden(names) is hidden


def test_the_curve_is_followed(run: LoggedRun) -> None:
    """A live page has each value once."""
    series = MetricSeriesSet()
    losses(run, [3.0, 2.0])
    with StoreReader(run.path / STORE_NAME) as reader:
        series.update(reader)
        series.update(reader)
        losses(run, [1.0], first=2)
        series.update(reader)

    [line] = series.lines()
    assert (line.name, line.steps.tolist(), line.values.tolist()) == ("traceml/loss", [0, 1, 2], [3.0, 2.0, 1.0])


def test_the_last_stage_of_a_pipeline_has_the_loss(run: LoggedRun) -> None:
    """Where rank 0 calls no backward on a loss, the lowest rank that does stands for the run, by its name."""
    summary = MetricSummary()
    losses(run, [3.0], rank=2)
    with StoreReader(run.path / STORE_NAME) as reader:
        summary.update(reader)
        assert summary.figures() == {}  # rank 0 may be slower

        losses(run, [2.0] * 40, rank=2, first=1)
        summary.update(reader)

    assert {name: each.number for name, each in summary.figures().items()} == {"traceml/loss/rank_2": 41}


def test_of_very_many_losses_some_are_read(run: LoggedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are spread over the run; those that come later are all read."""
    monkeypatch.setattr(metrics, "_LOSS_ROWS", 2_000)
    monkeypatch.setattr(metrics, "_LOSS_FRAMES", 4)
    losses(run, np.arange(10_000.0).tolist())
    summary = MetricSummary()
    with StoreReader(run.path / STORE_NAME) as reader:
        summary.update(reader)
        first = summary.figures()["traceml/loss"]
        losses(run, [-1.0], first=10_000)
        summary.update(reader)

    assert first.number <= 3_000
    assert first.least < 500
    assert first.greatest > 9_000
    assert (summary.figures()["traceml/loss"].least, summary.figures()["traceml/loss"].number) == (-1, first.number + 1)


def test_its_time_is_a_date(run: LoggedRun) -> None:
    """As that of logged values: the last value of two attempts is that of the later one."""
    losses(run, [3.0])
    with StoreReader(run.path / STORE_NAME) as reader:
        [[frame]] = list(metrics.MetricReader().read(reader))

    assert frame.rows["t_ns"].tolist() == [START_NS]
