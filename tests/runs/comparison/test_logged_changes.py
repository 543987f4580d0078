"""Metrics and parameters of two runs."""

from __future__ import annotations

from tests.renderers.reports import slow_rank
from traceml.runs.comparison.compare import metric_changes, param_changes
from traceml.runs.report.report_types import MetricSection, SetupSection


def reports(**sections):
    """Return two reports with other values of a section's key."""
    made = [slow_rank(), slow_rank()]
    for name, values in sections.items():
        for report, value in zip(made, values, strict=True):
            setattr(report, name, value)

    return made


def test_last_values_losses_first():
    """Metrics of both runs by name, those of rank 0; no share where a value is negative or not finite."""
    before = {"acc": 0.5, "val/loss": 2.0, "gap": -1.0, "bad": None, "only_a": 1.0, "acc/rank_1": 1.0}
    after = {"acc": 0.6, "val/loss": 1.0, "gap": 1.0, "bad": 1.0, "acc/rank_1": 1.0}
    a, b = reports(
        metrics=[{name: MetricSection(last=last) for name, last in each.items()} for each in (before, after)]
    )

    changes = {row.name: row.change for row in metric_changes(a, b)}

    assert list(changes) == ["val/loss", "acc", "bad", "gap"]
    assert changes == {"val/loss": -0.5, "acc": 0.2, "gap": None, "bad": None}


def test_parameters_that_differ():
    """Those with another value, and those that one run lacks."""
    a, b = reports(
        setup=[SetupSection(params={"lr": 0.1, "seed": 1, "old": "x"}), SetupSection(params={"lr": 0.2, "seed": 1})]
    )

    assert [(row.name, row.a, row.b) for row in param_changes(a, b)] == [("lr", 0.1, 0.2), ("old", "x", None)]
