"""Logged values and trackers in a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.track.fabricated import LoggedRun, deliver
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.runs.remove import is_delivered, prune
from traceml.runs.report.report import build_report, save_report, update_trackers
from traceml.runs.report.trackers import trackers
from traceml.runs.rows.metrics import MetricFigures, MetricSummary, metric_group, metric_turns


@pytest.fixture
def run(tmp_path: Path) -> LoggedRun:
    return LoggedRun(tmp_path / "runs" / "r1")


def test_each_name_has_its_last_least_and_greatest_value(run: LoggedRun) -> None:
    run.metrics({"loss": [3.0, 1.0, math.nan, 2.0], "odd": [math.nan, math.inf]})
    run.metrics({"loss": [5.0]}, rank=1)

    report = build_report(run.end()).to_dict()

    json.dumps(report, allow_nan=False)
    assert report["metrics"] == {
        "loss": {"last": 2.0, "min": 1.0, "max": 3.0, "count": 4},
        "odd": {"last": None, "min": None, "max": None, "count": 2},
        "loss/rank_1": {"last": 5.0, "min": 5.0, "max": 5.0, "count": 1},
    }


def test_values_are_followed_while_they_come(run: LoggedRun) -> None:
    metrics = MetricSummary()
    run.metrics({"loss": [3.0, 1.0]})
    with StoreReader(run.path / STORE_NAME) as reader:
        assert metrics.update(reader)
        assert not metrics.update(reader)
        run.metrics({"loss": [2.0], "new": [1.0]}, first_step=2)
        assert metrics.update(reader)

    assert metrics.figures()["loss"] == MetricFigures(last=2.0, least=1.0, greatest=3.0, number=3)
    assert metrics.figures()["new"].number == 1


def test_a_clock_that_is_set_back_hides_no_later_value(run: LoggedRun) -> None:
    run.metrics({"loss": [3.0, 2.0]})
    run.clock_ns -= 3600 * 10**9
    run.metrics({"loss": [1.0]}, first_step=2)

    assert build_report(run.end()).metrics["loss"].last == 1.0


def test_a_report_has_room_for_so_many_names(run: LoggedRun) -> None:
    run.metrics({f"layer_{i}": [float(i)] for i in range(1500)})
    metrics = MetricSummary()
    run_dir = run.end()
    with StoreReader(run_dir / STORE_NAME) as reader:
        metrics.update(reader)

    assert (len(metrics.figures()), len(metrics.hidden)) == (1000, 500)
    report = json.loads(save_report(run_dir, build_report(run_dir)).read_text())
    assert (len(report["metrics"]), report["hidden_metrics"]) == (1000, 500)


@pytest.mark.process
def test_a_written_report_follows_its_trackers(run: LoggedRun) -> None:
    run.experiment(["jsonl"], id="x")
    run.metrics({"loss": [3.0, 1.0]})
    run_dir = run.end()
    path = save_report(run_dir, build_report(run_dir))
    (told,) = json.loads(path.read_text())["trackers"]
    assert (told["backend"], told["delivered"], told["pending"]) == ("jsonl", 0, 3), "its announcement waits too"
    assert not is_delivered(run_dir)

    deliver(run_dir, "jsonl")
    update_trackers(run_dir)

    (told,) = json.loads(path.read_text())["trackers"]
    assert (told["backend"], told["state"], told["delivered"], told["pending"], told["failed"]) == (
        "jsonl", "done", 2, 0, 0,
    )  # fmt: skip
    assert told["latency_ms"] > 0
    assert told["urls"][0].startswith("file:///")
    assert trackers(run_dir)[0].pending is None, "nobody has counted what is stored"
    assert is_delivered(run_dir)


@pytest.mark.process
def test_pruning_leaves_what_is_not_delivered(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        run = LoggedRun(tmp_path / name)
        run.experiment(["jsonl"] if name == "b" else [], id=name)
        run.end()

    assert [info.id for info in prune(tmp_path, keep=0)] == ["c", "a"]
    deliver(tmp_path / "b", "jsonl")
    assert [info.id for info in prune(tmp_path, keep=0)] == ["b"]


@pytest.mark.parametrize(
    ("name", "group"), [("loss", ""), ("train/loss", "train"), ("grad/layer0/weight", "grad"), ("/odd", "")]
)
def test_metrics_of_all_layers_are_one_group(name, group):
    """A group of each layer has one chart in a row of three: thirty layers filled ten screens."""
    assert metric_group(name) == group


def test_metrics_of_each_group_take_turns():
    """The first of each group; of a group, names of all layers take turns with its others, and 2 comes before 10."""
    layers = [f"train/layer{number}/norm" for number in range(12)]

    turns = metric_turns([*reversed(layers), "train/loss", "val/accuracy", "lr"])

    assert [name for name, turn in turns.items() if turn == 0] == ["lr", "train/layer0/norm", "val/accuracy"]
    assert sorted(turns, key=turns.__getitem__)[3:6] == ["train/loss", "train/layer1/norm", "train/layer2/norm"]
