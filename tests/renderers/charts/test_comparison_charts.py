"""Two runs side by side, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml.renderers.charts.comparison_charts import (
    compared_phases_chart,
    compared_ranks_chart,
    compared_steps_chart,
    overlaid_steps_chart,
)
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.rows.series import read_series


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and the same with a slow rank."""
    job = Job(ranks=3, steps=200)
    return store_run(tmp_path / "a", job), store_run(tmp_path / "b", job, adds("forward", 9, (1,)))


def test_both_runs_are_drawn_in_colors_of_their_own(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    steps = compared_steps_chart(*(read_series(run).steps for run in runs))
    charts = [steps, compared_phases_chart(comparison), compared_ranks_chart(comparison)]

    for chart in charts:
        assert chart is not None
        assert len({series["itemStyle"]["color"] for series in chart["series"]}) == 2
        json.dumps(chart, allow_nan=False)

    a, b = (series["data"] for series in charts[2]["series"])  # type: ignore[index]
    assert b[1] > a[1] + 8
    assert abs(b[0] - a[0]) < 3


def test_a_run_has_one_color_in_all_charts(runs: tuple[Path, Path]) -> None:
    """The chart of two runs and that of several stand on one page."""
    comparison, (a, b) = compare_runs(*runs), (read_series(run).steps for run in runs)
    drawn = (
        compared_steps_chart(a, b),
        compared_phases_chart(comparison),
        compared_ranks_chart(comparison),
        overlaid_steps_chart([("A", a), ("B", b)]),
    )

    assert len({tuple(series["itemStyle"]["color"] for series in chart["series"]) for chart in drawn if chart}) == 1
    assert None not in drawn


def test_a_run_without_steps_is_not_drawn(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    empty = read_series(store_run(tmp_path / "c", Job(ranks=1, steps=0, grouped=False))).steps

    assert compared_steps_chart(empty, read_series(runs[0]).steps) is None
