"""Charts of two runs side by side, and of several in one, as ECharts options."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.formatting import name_without_rank, phase_label
from traceml.renderers.charts.chart_options import (
    Option,
    Points,
    bar_series,
    blank,
    category_axis,
    cut_at,
    lines_over,
    number,
    pairs,
    value_axis,
)
from traceml.renderers.charts.palette import LIGHT, Theme
from traceml.renderers.views import SMALL_SHARE
from traceml.runs.comparison.comparison_types import Comparison
from traceml.runs.rows.metrics import drawn_metrics, is_loss
from traceml.runs.rows.series import RunSeries, StepSeries

__all__ = [
    "compared_phases_chart",
    "compared_ranks_chart",
    "compared_steps_chart",
    "overlaid_metric_charts",
    "overlaid_steps_chart",
]

_RANKS = 24
_METRICS = 24


def compared_steps_chart(a: StepSeries, b: StepSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the median step time of both runs over their steps; None if one has no steps."""
    if not len(a) or not len(b):
        return None

    lines = [(name, pairs(each.steps, each.p50_ms)) for name, each in (("A p50", a), ("B p50", b))]
    option = lines_over(lines, theme, "step", "ms", width=2)
    longer = a if float(a.p50_ms.max(initial=0)) > float(b.p50_ms.max(initial=0)) else b
    cut_at(option, longer.p50_ms)
    return option


def overlaid_steps_chart(runs: Sequence[tuple[str, StepSeries]], theme: Theme = LIGHT) -> Option | None:
    """Return the median step time of several runs over their steps; those without steps are left out."""
    lines = [(name, pairs(each.steps, each.p50_ms)) for name, each in runs if len(each)]
    if not lines:
        return None

    option = _overlaid(lines, theme, "ms")
    cut_at(option, max((each.p50_ms for _, each in runs if len(each)), key=lambda p50_ms: float(p50_ms.max())))
    return option


def overlaid_metric_charts(runs: Sequence[tuple[str, RunSeries]], theme: Theme = LIGHT) -> list[tuple[str, Option]]:
    """Return (name, chart) of metrics of several runs, those that most runs have first; rank 0 of each run."""
    found: dict[str, list[tuple[str, Points]]] = {}
    for run, series in runs:
        for line in series.metrics:
            if line.name == name_without_rank(line.name):
                found.setdefault(line.name, []).append((run, pairs(line.steps, line.values)))

    names = drawn_metrics(found, _METRICS, lambda name: (-len(found[name]), not is_loss(name)))
    colors = {run: theme.lines[place % len(theme.lines)] for place, (run, _) in enumerate(runs)}
    return [(name, _overlaid(found[name], theme, "", [colors[run] for run, _ in found[name]])) for name in names]


def _overlaid(lines: Sequence[tuple[str, Points]], theme: Theme, unit: str, colors: Sequence[str] = ()) -> Option:
    option = lines_over(lines, theme, "step", unit, colors)
    option["yAxis"]["scale"] = not unit
    return option


def compared_phases_chart(comparison: Comparison, theme: Theme = LIGHT) -> Option | None:
    """Return the mean of each phase in both runs, the phases that changed most first."""
    mean = comparison.step_time.mean
    step = max(mean.a_ms or 0.0, mean.b_ms or 0.0)
    rows = [row for row in comparison.phases if max(row.a_ms, row.b_ms) >= SMALL_SHARE * step]
    return _bars([(phase_label(row.phase), row.a_ms, row.b_ms) for row in rows], theme)


def compared_ranks_chart(comparison: Comparison, theme: Theme = LIGHT) -> Option | None:
    """Return each rank's own work in both runs; of many ranks those that changed most."""
    rows = [row for row in comparison.ranks if row.change is not None]
    most = sorted(rows, key=lambda row: -abs(row.change or 0.0))[:_RANKS]
    rows = sorted(most, key=lambda row: row.rank)
    return _bars([(f"rank {row.rank}", row.a_work_ms or 0.0, row.b_work_ms or 0.0) for row in rows], theme)


def _bars(rows: list[tuple[str, float, float]], theme: Theme) -> Option | None:
    if not rows:
        return None

    option = blank(theme)
    option["xAxis"] = value_axis(theme, "ms")
    option["yAxis"] = {**category_axis([label for label, _, _ in rows], theme), "inverse": True}
    for name, values, color in (
        ("A", [number(a) for _, a, _ in rows], theme.lines[0]),
        ("B", [number(b) for _, _, b in rows], theme.lines[1]),
    ):
        option["series"].append(bar_series(name, values, color))

    return option
