"""Marks of charts as SVG: lines, stacked areas, bars, cells of a heat map; escaped text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from traceml.formatting import printable
from traceml.renderers.charts.scales import CHAR, Scale, rounded, text_of

__all__ = ["Plot", "escaped", "heat_cells", "label", "marks", "rectangle", "stacked", "y_axes"]

Points = list[tuple[float, float, float]]
"""(x, from, to): a mark begins at 0, or at the top of the one below it; `to` is NaN if there is none."""


class Plot(msgspec.Struct, frozen=True):
    """The area inside the axes, as its scales; `right` where there is a second y axis."""

    x: Scale
    y: Scale
    right: Scale | None

    def y_of(self, series: Mapping[str, Any]) -> Scale:
        """Return the y scale of a series."""
        return self.right if series.get("yAxisIndex") and self.right is not None else self.y


def escaped(text: Any) -> str:
    """Return text escaped for HTML and attributes, and printable."""
    return html.escape(printable(str(text), lines=True))


def label(x: float, y: float, text: str, anchor: str, color: str | None = None) -> str:
    """Return an SVG text; nothing for an empty one.

    Args:
        y: base line.
        text: not yet escaped.
        anchor: the part of the text at `x`: start, middle or end.
        color: where its group sets none.
    """
    if not text:
        return ""

    style = f' style="fill:{color}"' if color else ""
    return f'<text x="{rounded(x)}" y="{rounded(y)}" text-anchor="{anchor}"{style}>{escaped(text)}</text>'


def y_axes(option: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the y axes, one or two."""
    axis = option["yAxis"]
    return axis if isinstance(axis, list) else [axis]


def stacked(series: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Points]]:
    """Yield each series with its points (x, from, to)."""
    tops: dict[tuple[str, float], float] = {}
    for each in series:
        points: Points = []
        for x, y in _points(each):
            if y is None:
                points.append((x, 0.0, math.nan))
                continue

            key = str(each.get("stack", "")), x
            base = tops.get(key, 0.0) if key[0] else 0.0
            tops[key] = base + y
            points.append((x, base, base + y))

        yield each, points


def _points(series: Mapping[str, Any]) -> Iterator[tuple[float, float | None]]:
    for index, value in enumerate(series["data"]):
        if isinstance(value, list):
            yield value[0], value[1]
        else:
            yield float(index), value


def marks(option: Mapping[str, Any], plot: Plot) -> Iterator[str]:
    """Yield the lines, areas and bars of a chart."""
    bars = [series for series in option["series"] if series["type"] == "bar"]
    for series, points in stacked(option["series"]):
        if series["type"] == "bar":
            yield from _bars(series, points, bars, plot, horizontal=y_axes(option)[0]["type"] == "category")
        else:
            yield from _line(series, points, plot)


def _line(series: Mapping[str, Any], points: Points, plot: Plot) -> Iterator[str]:
    y_of, color = plot.y_of(series), series["itemStyle"]["color"]
    for run in _unbroken(points):
        upper = [(plot.x.at(x), y_of.at(y)) for x, _, y in run]
        if "areaStyle" in series:
            lower = [(plot.x.at(x), y_of.at(base)) for x, base, _ in reversed(run)]
            opacity = series["areaStyle"].get("opacity", 1)
            yield f'<path d="M{_path([*upper, *lower])}Z" style="fill:{color};fill-opacity:{opacity}"/>'
        elif len(run) == 1:
            yield f'<circle cx="{rounded(upper[0][0])}" cy="{rounded(upper[0][1])}" r="2.5" style="fill:{color}"/>'
        else:
            line = f"fill:none;stroke:{color};stroke-width:{series['lineStyle']['width']};stroke-linejoin:round"
            yield f'<path d="M{_path(upper)}" style="{line}"/>'


def _unbroken(points: Points) -> Iterator[Points]:
    run: Points = []
    for point in points:
        if not math.isnan(point[2]):
            run.append(point)
        elif run:
            yield run
            run = []

    if run:
        yield run


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{rounded(x)} {rounded(y)}" for x, y in points)


def _bars(
    series: Mapping[str, Any],
    points: Points,
    bars: Sequence[Mapping[str, Any]],
    plot: Plot,
    *,
    horizontal: bool,
) -> Iterator[str]:
    groups = list(dict.fromkeys(each.get("stack", each["name"]) for each in bars))
    place, values = (plot.y, plot.x) if horizontal else (plot.x, plot.y)
    thick = min(place.step * 0.76 / len(groups), series.get("barMaxWidth", 22))
    offset = (groups.index(series.get("stack", series["name"])) - len(groups) / 2) * thick
    for index, base, top in points:
        if math.isnan(top) or top == base:
            continue

        across = place.at(index) + offset
        one, two = sorted((values.at(base), values.at(top)))
        box = (one, across, two - one, thick) if horizontal else (across, one, thick, two - one)
        title = f"{series['name']}: {text_of(top - base)}"
        yield rectangle(box, series["itemStyle"]["color"], title)


def rectangle(box: tuple[float, float, float, float], color: str, title: str = "") -> str:
    """Return a rectangle (x, y, width, height) with a title."""
    x, y, wide, high = (rounded(value) for value in box)
    child = f"<title>{escaped(title)}</title>" if title else ""
    return f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" style="fill:{color}">{child}</rect>'


def heat_cells(option: Mapping[str, Any], plot: Plot, width: int) -> Iterator[str]:
    """Yield a row of cells per rank; adjacent cells of one color are merged."""
    levels, most = option["visualMap"]["inRange"]["color"], option["visualMap"]["max"] or 1
    rows: dict[int, list[tuple[int, int]]] = {}
    for step, row, value in option["series"][0]["data"]:
        level = min(int(len(levels) * (value or 0) / most), len(levels) - 1)
        rows.setdefault(row, []).append((step, level))

    wide, high = plot.x.step, plot.y.step
    for row, cells in rows.items():
        yield f"<g><title>{escaped(option['yAxis']['data'][row])}</title>"
        for first, last, level in _runs(sorted(cells)):
            left, top = plot.x.at(first) - wide / 2, plot.y.at(row) - high / 2
            yield rectangle((left, top, (last - first + 1) * wide + 0.2, max(high - 0.5, high * 0.9)), levels[level])

        yield "</g>"

    visual = option["visualMap"]
    yield from _heat_key(levels, visual["text"], visual["textStyle"]["color"], width)


def _runs(cells: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    first, last, level = cells[0][0], cells[0][0], cells[0][1]
    for step, other in cells[1:]:
        if other == level and step == last + 1:
            last = step
            continue

        yield first, last, level
        first, last, level = step, step, other

    yield first, last, level


def _heat_key(levels: Sequence[str], texts: Sequence[str], muted: str, width: int) -> Iterator[str]:
    right = width - 12
    yield label(right, 14, texts[0], "end", muted)
    start = right - CHAR * len(texts[0]) - 8 - 12 * len(levels)
    for number, color in enumerate(levels):
        yield rectangle((start + 12 * number, 5, 12.2, 10), color)

    yield label(start - 5, 14, texts[1], "end", muted)
