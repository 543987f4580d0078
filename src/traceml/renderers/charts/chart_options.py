"""Parts of ECharts options, and numbers as JSON allows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from traceml.renderers.charts.palette import Theme

__all__ = [
    "Option",
    "Points",
    "bar_series",
    "blank",
    "category_axis",
    "cut_at",
    "line_series",
    "lines_over",
    "number",
    "pairs",
    "plain_values",
    "set_ends",
    "tooltip",
    "value_axis",
]

Option = dict[str, Any]
Points = list[list[float | None]]

# A few very long steps (the first one includes set-up) must not flatten the others.
_CUT = 2.5


def blank(theme: Theme) -> Option:
    """Return an option without axes and series."""
    return {
        "animation": False,
        "backgroundColor": "transparent",
        "textStyle": {"color": theme.text, "fontFamily": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"},
        "legend": {"show": True, "type": "scroll", "top": 0, "left": 0, "right": 0, "itemWidth": 12, "itemHeight": 8,
                   "icon": "roundRect", "textStyle": {"color": theme.muted, "fontSize": 11, "lineHeight": 16}},
        "tooltip": tooltip(theme),
        "grid": {"left": 8, "right": 16, "top": 44, "bottom": 8, "containLabel": True},
        "series": [],
    }  # fmt: skip


def tooltip(theme: Theme) -> Option:
    """Return a tooltip with the values of all lines at one place."""
    return {
        "trigger": "axis",
        "confine": True,
        "backgroundColor": theme.ground,
        "borderColor": theme.rule,
        "textStyle": {"color": theme.text, "fontSize": 12},
    }


def category_axis(labels: Sequence[str], theme: Theme) -> Option:
    """Return an axis of labels."""
    return {
        "type": "category",
        "data": list(labels),
        "axisLabel": {"color": theme.muted, "fontSize": 11, "hideOverlap": True},
        "axisLine": {"lineStyle": {"color": theme.rule}},
        "axisTick": {"show": False},
        "nameTextStyle": {"color": theme.muted, "fontSize": 11},
        "nameLocation": "end",
        "nameGap": 4,
    }


def value_axis(theme: Theme, name: str) -> Option:
    """Return an axis of numbers; `name` is the unit."""
    return {
        "type": "value",
        "name": name,
        "axisLabel": {"color": theme.muted, "fontSize": 11, "hideOverlap": True},
        "axisLine": {"show": False},
        "axisTick": {"show": False},
        "splitLine": {"show": True, "lineStyle": {"color": theme.rule}},
        "splitNumber": 4,
        "nameTextStyle": {"color": theme.muted, "fontSize": 11},
        "nameGap": 8,
    }


def line_series(name: str, data: list[Any], color: str, width: float) -> Option:
    """Return a line; `data` holds values, or pairs on a numeric x axis."""
    return {
        "name": name,
        "type": "line",
        "data": data,
        "showSymbol": len(data) == 1,
        "symbolSize": 5,
        "lineStyle": {"color": color, "width": width},
        "itemStyle": {"color": color},
    }


def bar_series(name: str, data: list[Any], color: str, stack: str | None = None) -> Option:
    """Return bars; those of one `stack` are stacked."""
    bar: Option = {"name": name, "type": "bar", "data": data, "itemStyle": {"color": color}, "barMaxWidth": 22}
    return bar if stack is None else {**bar, "stack": stack}


def cut_at(option: Option, values: Any) -> None:
    """End the y axis above nearly all values; the few longer ones are cut."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return

    usual = _CUT * float(np.quantile(finite, 0.9))
    if finite.max() > usual > 0:
        option["yAxis"]["max"] = _rounded_up(usual)


def _rounded_up(value: float) -> float:
    unit = 10 ** math.floor(math.log10(value))
    return next((step * unit for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * unit >= value), value)


def set_ends(option: Option) -> None:
    """Make the x axis begin and end at the points."""
    xs = [pair[0] for each in option["series"] for pair in each["data"]]
    least, most = (min(xs), max(xs)) if xs else (0, 1)
    option["xAxis"] |= {"min": least, "max": most if most > least else least + 1}


def lines_over(
    lines: Iterable[tuple[str, Points]], theme: Theme, x: str, y: str, colors: Sequence[str] = (), width: float = 1.5
) -> Option:
    """Return lines over numbers, in the theme's colors where none are given; `x` and `y` are the units."""
    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, x), "splitLine": {"show": False}}
    option["yAxis"] = value_axis(theme, y)
    colors = colors or theme.lines
    for place, (name, points) in enumerate(lines):
        option["series"].append(line_series(name, points, colors[place % len(colors)], width))

    set_ends(option)
    return option


def pairs(x: Any, y: Any) -> Points:
    """Return points of a line over numbers."""
    return [[number(each, 6), value] for each, value in zip(x.tolist(), plain_values(y), strict=True)]


def plain_values(values: Any) -> list[float | None]:
    """Return numbers for JSON, None for those that are not finite."""
    return [number(value) for value in np.asarray(values, np.float64).tolist()]


def number(value: float, digits: int = 4) -> float | None:
    """Return a number for JSON, rounded; None if it is not finite."""
    if not math.isfinite(value):
        return None

    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
