"""Charts of two runs side by side, as ECharts options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traceml.formatting import phase_label
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
from traceml.runs.series import StepSeries

__all__ = ["compared_phases_chart", "compared_ranks_chart", "compared_steps_chart"]

_SMALL_SHARE = 0.005
_RANKS = 24


def compared_steps_chart(a: StepSeries, b: StepSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the median step time of both runs over their steps; None where one has no steps."""
    if not len(a) or not len(b):
        return None

    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, "step"), "splitLine": {"show": False}}
    option["yAxis"] = value_axis(theme, "ms")
    for name, steps, color in (("A p50", a, theme.lines[4]), ("B p50", b, theme.lines[0])):
        data = pairs(steps.steps.tolist(), plain_values(steps.p50_ms))
        option["series"].append(line_series(name, data, color, 2))

    set_ends(option)
    longer = a if float(a.p50_ms.max(initial=0)) > float(b.p50_ms.max(initial=0)) else b
    cut_at(option, longer.p50_ms)
    return option


def compared_phases_chart(comparison: Mapping[str, Any], theme: Theme = LIGHT) -> Option | None:
    """Return the mean of each phase in both runs, the phases that changed most first.

    Args:
        comparison: in the shape of `traceml.compare/1`.
        theme: the colours.
    """
    step = max((comparison["step_time"]["mean"][side] or 0.0) for side in ("a_ms", "b_ms"))
    rows = [row for row in comparison["phases"] if max(row["a_ms"], row["b_ms"]) >= _SMALL_SHARE * step]
    return _bars([phase_label(row["phase"]) for row in rows], rows, ("a_ms", "b_ms"), theme)


def compared_ranks_chart(comparison: Mapping[str, Any], theme: Theme = LIGHT) -> Option | None:
    """Return each rank's own work in both runs; of many ranks those that changed most.

    Args:
        comparison: in the shape of `traceml.compare/1`.
        theme: the colours.
    """
    rows = [row for row in comparison["ranks"] if row["change"] is not None]
    most = sorted(rows, key=lambda row: -abs(row["change"]))[:_RANKS]
    rows = sorted(most, key=lambda row: int(row["rank"]))
    return _bars([f"rank {row['rank']}" for row in rows], rows, ("a_work_ms", "b_work_ms"), theme)


def _bars(labels: list[str], rows: list[Any], sides: tuple[str, str], theme: Theme) -> Option | None:
    if not rows:
        return None

    option = blank(theme)
    option["xAxis"] = value_axis(theme, "ms")
    option["yAxis"] = {**category_axis(labels, theme), "inverse": True}
    for name, side, color in (("A", sides[0], theme.lines[4]), ("B", sides[1], theme.lines[0])):
        option["series"].append(bar_series(name, [number(row[side]) for row in rows], color))

    return option
