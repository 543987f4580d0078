"""Differences of two runs in what they logged: last values of metrics, and parameters."""

from __future__ import annotations

import re

from traceml.diagnosis.findings import significant
from traceml.formatting import name_order
from traceml.runs.comparison.comparison_types import MetricChange, ParamChange
from traceml.runs.report.report_types import Report

__all__ = ["metric_changes", "param_changes"]

_OF_RANK = re.compile(r"/rank_\d+$")


def metric_changes(a: Report, b: Report) -> list[MetricChange]:
    """Return the last values of metrics that both runs have, losses first; those of rank 0."""
    names = [name for name in a.metrics if name in b.metrics and not _OF_RANK.search(name)]
    changes = [_metric(name, a.metrics[name].last, b.metrics[name].last) for name in names]
    return sorted(changes, key=lambda change: ("loss" not in change.name.lower(), name_order(change.name)))


def param_changes(a: Report, b: Report) -> list[ParamChange]:
    """Return the parameters whose values differ; of a missing one the value is None."""
    first, second = a.setup.params, b.setup.params
    names = dict.fromkeys([*first, *second])
    return [
        ParamChange(name=name, a=first.get(name), b=second.get(name))
        for name in names
        if first.get(name) != second.get(name)
    ]


def _metric(name: str, before: float | None, after: float | None) -> MetricChange:
    change = after / before - 1 if before is not None and before > 0 and after is not None and after >= 0 else None
    return MetricChange(name=name, a=before, b=after, change=significant(change))
