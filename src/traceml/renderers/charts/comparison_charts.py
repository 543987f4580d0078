"""Charts of two runs side by side, and of several in one, as ECharts options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from traceml.formatting import name_order, phase_label
from traceml.renderers.charts.chart_options import (
    Option,
    bar_series,
    blank,
    category_axis,
    cut_at,
    line_series,
    number,
    pairs,
    plain_values,
    set_ends,
    value_axis,
)
from traceml.renderers.charts.palette import LIGHT, Theme
from traceml.runs.comparison.comparison_types import Comparison
from traceml.runs.rows.series import RunSeries, StepSeries

__all__ = [
    "compared_phases_chart",
    "compared_ranks_chart",
    "compared_steps_chart",
    "overlaid_metric_charts",
    "overlaid_steps_chart",
]

_SMALL_SHARE = 0.005
_RANKS = 24
_METRICS = 24


def compared_steps_chart(a: StepSeries, b: StepSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the median step time of both runs over their steps; None where one has no steps."""
    if not len(a) or not len(b):
        return None

    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, "step"), "splitLine": {"show": False}}
    option["yAxis"] = value_axis(theme, "ms")
    for name, steps, color in (("A p50", a, theme.lines[0]), ("B p50", b, theme.lines[1])):
        data = pairs(steps.steps.tolist(), plain_values(steps.p50_ms))
        option["series"].append(line_series(name, data, color, 2))

    set_ends(option)
    longer = a if float(a.p50_ms.max(initial=0)) > float(b.p50_ms.max(initial=0)) else b
    cut_at(option, longer.p50_ms)
    return option


def overlaid_steps_chart(runs: Sequence[tuple[str, StepSeries]], theme: Theme = LIGHT) -> Option | None:
    """Return the median step time of several runs over their steps; those without steps are left out."""
    lines = [(name, pairs(each.steps.tolist(), plain_values(each.p50_ms))) for name, each in runs if len(each)]
    option = _overlaid(lines, theme, "ms")
    if option is not None:
        slowest = max((each.p50_ms for _, each in runs if len(each)), key=lambda p50_ms: float(p50_ms.max()))
        cut_at(option, slowest)

    return option


def overlaid_metric_charts(runs: Sequence[tuple[str, RunSeries]], theme: Theme = LIGHT) -> list[tuple[str, Option]]:
    """Return (name, chart) of metrics of several runs, those that most runs have first; rank 0 of each run."""
    found: dict[str, list[tuple[str, list[list[float | None]]]]] = {}
    for run, series in runs:
        for line in series.metrics:
            if "/rank_" not in line.name:
                points = pairs(line.steps.tolist(), plain_values(line.values))
                found.setdefault(line.name, []).append((run, points))

    names = sorted(found, key=lambda name: (-len(found[name]), "loss" not in name.lower(), name_order(name)))[:_METRICS]
    colors = {run: theme.lines[place % len(theme.lines)] for place, (run, _) in enumerate(runs)}
    charts = [(name, _overlaid(found[name], theme, "", colors)) for name in names]
    return [(name, option) for name, option in charts if option is not None]


def _overlaid(
    lines: Sequence[tuple[str, list[list[float | None]]]],
    theme: Theme,
    unit: str,
    colors: Mapping[str, str] = MappingProxyType({}),
) -> Option | None:
    if not lines:
        return None

    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, "step"), "splitLine": {"show": False}}
    option["yAxis"] = {**value_axis(theme, unit), "scale": not unit}
    for place, (name, points) in enumerate(lines):
        color = colors.get(name) or theme.lines[place % len(theme.lines)]
        option["series"].append(line_series(name, points, color, 1.5))

    set_ends(option)
    return option


def compared_phases_chart(comparison: Comparison, theme: Theme = LIGHT) -> Option | None:
    """Return the mean of each phase in both runs, the phases that changed most first."""
    mean = comparison.step_time.mean
    step = max(mean.a_ms or 0.0, mean.b_ms or 0.0)
    rows = [row for row in comparison.phases if max(row.a_ms, row.b_ms) >= _SMALL_SHARE * step]
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
