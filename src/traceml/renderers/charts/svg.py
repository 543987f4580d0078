"""Charts as SVG for reports and notebooks, without a browser.

Text of a run is escaped. Numbers under the pointer are SVG titles, so that no script is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from traceml.renderers.charts.scales import CHAR, Scale, category_scale, rounded, text_of, value_scale
from traceml.renderers.charts.svg_marks import Plot, escaped, heat_cells, label, marks, rectangle, stacked, y_axes

__all__ = ["draw"]

_FONT = 11
_LEGEND_ROW = 17
_LEGEND_ROWS = 3
_LONGEST_LABEL = 22
_LONGEST_NAME = 40


def draw(option: Mapping[str, Any], title: str, width: int = 720, height: int = 250) -> str:
    """Return an `<svg>` element.

    Args:
        title: its subject, for screen readers.
        width: in the drawing's own units; on a page it fills the available width.
    """
    rows = _legend_rows(option, width)
    is_heat = bool(option["series"]) and option["series"][0]["type"] == "heatmap"
    named = any(axis.get("name") for axis in y_axes(option))
    plot = _plot(option, width, height, 8 + _LEGEND_ROW * max(len(rows), is_heat) + (16 if named else 4))
    parts = [
        *_legend(rows, option),
        *_grid(option, plot),
        *(heat_cells(option, plot, width) if is_heat else marks(option, plot)),
        *_axes(option, plot),
        *([] if is_heat else _hovers(option, plot)),
    ]
    family = escaped(option["textStyle"]["fontFamily"])
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(title)}" '
        f'style="width:100%;height:auto;font:{_FONT}px {family}">{"".join(parts)}</svg>'
    )


def _plot(option: Mapping[str, Any], width: int, height: int, top: int) -> Plot:
    x_axis, axes = option["xAxis"], y_axes(option)
    bottom = height - 20 - (14 if x_axis.get("name") else 0)
    y = _y_scale(option, axes[0], 0, bottom, top)
    right = _y_scale(option, axes[1], 1, bottom, top) if len(axes) > 1 else None
    left = 10 + CHAR * max((len(_short(label)) for _, label in y.ticks), default=1)
    end = width - 12 - (CHAR * max(len(label) for _, label in right.ticks) if right is not None else 0)
    if x_axis["type"] == "category":
        bands = x_axis.get("boundaryGap", True)
        return Plot(category_scale(x_axis["data"], left, end, bands=bands, across=True), y, right)

    return Plot(value_scale(x_axis, _xs(option), left, end, ticks=7), y, right)


def _y_scale(option: Mapping[str, Any], axis: Mapping[str, Any], index: int, bottom: float, top: float) -> Scale:
    if axis["type"] == "category":
        start, end = (top, bottom) if axis.get("inverse") else (bottom, top)
        return category_scale(axis["data"], start, end, bands=True, across=False)

    return value_scale(axis, _ys(option, index), bottom, top)


def _is_horizontal(option: Mapping[str, Any]) -> bool:
    """Return whether bars are horizontal: categories from top to bottom."""
    return bool(y_axes(option)[0]["type"] == "category")


def _ys(option: Mapping[str, Any], index: int) -> list[float]:
    on_axis = [series for series in option["series"] if series.get("yAxisIndex", 0) == index]
    return [y for _, series in stacked(on_axis) for _, _, y in series]


def _xs(option: Mapping[str, Any]) -> list[float]:
    if _is_horizontal(option):
        return [y for _, series in stacked(option["series"]) for _, _, y in series]

    return [pair[0] for series in option["series"] for pair in series["data"]]


def _legend_rows(option: Mapping[str, Any], width: int) -> list[list[tuple[float, str, str]]]:
    """Return rows of (x, name, color), as many as fit."""
    if not option["legend"]["show"]:
        return []

    rows: list[list[tuple[float, str, str]]] = [[]]
    x = 8.0
    for series in option["series"]:
        name = _short(series["name"], _LONGEST_NAME)
        wide = 16 + CHAR * len(name) + 14
        if rows[-1] and x + wide > width:
            rows.append([])
            x = 8.0

        rows[-1].append((x, name, series["itemStyle"]["color"]))
        x += wide

    return rows[:_LEGEND_ROWS]


def _legend(rows: list[list[tuple[float, str, str]]], option: Mapping[str, Any]) -> Iterator[str]:
    muted = option["legend"]["textStyle"]["color"]
    for number, row in enumerate(rows):
        y = 6 + _LEGEND_ROW * number
        for x, name, color in row:
            yield rectangle((x, y, 11, 8), color)
            yield label(x + 15, y + 8, name, "start", muted)


def _grid(option: Mapping[str, Any], plot: Plot) -> Iterator[str]:
    x, y = plot.x, plot.y
    if not _is_horizontal(option):
        lines = [f"M{rounded(x.start)} {rounded(y.at(tick))}H{rounded(x.end)}" for tick, _ in y.ticks]
    elif option["xAxis"]["type"] == "value":
        lines = [f"M{rounded(x.at(tick))} {rounded(y.start)}V{rounded(y.end)}" for tick, _ in x.ticks]
    else:
        return

    yield f'<path d="{"".join(lines)}" style="fill:none;stroke:{option["tooltip"]["borderColor"]}"/>'


def _axes(option: Mapping[str, Any], plot: Plot) -> Iterator[str]:
    left, end, axes = plot.x.start - 5, plot.x.end, y_axes(option)
    head, foot = min(plot.y.start, plot.y.end) - 8, max(plot.y.start, plot.y.end)
    yield f'<g style="fill:{option["legend"]["textStyle"]["color"]}">'
    yield from (label(plot.x.at(tick), foot + 14, _short(text), "middle") for tick, text in plot.x.ticks)
    yield from (label(left, plot.y.at(tick) + 4, _short(text), "end") for tick, text in plot.y.ticks)
    yield label(left, head, axes[0].get("name", ""), "end")
    if plot.right is not None:
        yield from (label(end + 5, plot.right.at(tick) + 4, text, "start") for tick, text in plot.right.ticks)
        yield label(end + 30, head, axes[1].get("name", ""), "end")

    yield label(end, foot + 27, option["xAxis"].get("name", ""), "end")
    yield "</g>"


def _hovers(option: Mapping[str, Any], plot: Plot) -> Iterator[str]:
    """Yield an invisible strip per step of the axis, with its numbers as a title."""
    if option["xAxis"]["type"] != "category" or option["xAxis"].get("boundaryGap", True):
        return

    unit = y_axes(option)[0].get("name", "")
    top, high = min(plot.y.start, plot.y.end), abs(plot.y.end - plot.y.start)
    wide = plot.x.step
    for index, place in enumerate(option["xAxis"]["data"]):
        lines = [f"{option['xAxis'].get('name', '')} {place}"]
        values = [(series["name"], series["data"][index]) for series in option["series"]]
        lines += [f"{name}: {text_of(value)} {unit}" for name, value in values if value is not None]
        box = (plot.x.at(index) - wide / 2, top, wide, high)
        yield rectangle(box, "transparent", "\n".join(lines))


def _short(text: str, most: int = _LONGEST_LABEL) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
