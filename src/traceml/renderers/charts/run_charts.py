"""Charts of a run as ECharts options, drawn by ECharts on the page and as SVG in reports and notebooks.

They use a small part of ECharts, which `svg` draws too: lines, areas and bars (stacked or not) over category or value
axes, and heat maps. A chart without data is None.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import in_phase_order
from traceml.formatting import (
    duration_text,
    name_without_rank,
    part_words,
    percent_text,
    phase_label,
    plural,
)
from traceml.renderers.charts.chart_options import (
    Option,
    Points,
    bar_series,
    blank,
    category_axis,
    cut_at,
    line_series,
    lines_over,
    number,
    pairs,
    plain_values,
    set_ends,
    tooltip,
    value_axis,
)
from traceml.renderers.charts.palette import LIGHT, Theme
from traceml.renderers.views import SMALL_SHARE, RunView, visible_ranks
from traceml.runs.rows.logged_media import LoggedItem
from traceml.runs.rows.metric_series import MetricSeries
from traceml.runs.rows.metrics import drawn_metrics, is_loss
from traceml.runs.rows.series import HeatMap, RunSeries, SampleSeries, StepSeries

__all__ = [
    "heatmap_chart",
    "histogram_chart",
    "loss_chart",
    "memory_chart",
    "metric_charts",
    "metric_count",
    "phases_chart",
    "ranks_chart",
    "step_time_chart",
    "system_chart",
    "time_chart",
]

_GIB = 2**30
_RANK_BARS = 24
_LINES = 8
_HEAT_LABELS = 32
_MIN_HEAT_PCT = 25.0
_METRICS = 24
_BARE_TOP_PX = 14
_TIME_UNITS = (("h", 3600), ("min", 60), ("s", 1))
_MARK = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}"
_HISTOGRAMS = 5


def step_time_chart(steps: StepSeries, theme: Theme = LIGHT) -> Option | None:
    """Return percentiles of step time over the steps."""
    if not len(steps):
        return None

    option = _over_steps(steps.steps.tolist(), theme)
    for name, values, color, width in (
        ("p99", steps.p99_ms, theme.lines[3], 1),
        ("p95", steps.p95_ms, theme.lines[1], 1),
        ("p50", steps.p50_ms, theme.lines[0], 2.5),
    ):
        option["series"].append(line_series(name, plain_values(values), color, width))

    cut_at(option, steps.p99_ms)
    return option


def phases_chart(steps: StepSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the phases of a mean step, stacked, over the steps."""
    if not len(steps) or not steps.phases_ms:
        return None

    option = _over_steps(steps.steps.tolist(), theme)
    whole = np.nansum(list(steps.phases_ms.values()), axis=0)
    colors = theme.of_phases(steps.phases_ms)
    for name in in_phase_order(steps.phases_ms):
        values = steps.phases_ms[name]
        if np.nansum(values) >= SMALL_SHARE * whole.sum():
            area = line_series(phase_label(name), plain_values(values), colors[name], 0)
            option["series"].append({**area, "stack": "step", "areaStyle": {"color": colors[name], "opacity": 0.9}})

    cut_at(option, whole)
    return option


def ranks_chart(view: RunView, theme: Theme = LIGHT) -> Option | None:
    """Return each rank's mean step, divided into phases; of very many ranks the slowest and some others."""
    rows = [row for row in visible_ranks(view.ranks, _RANK_BARS) if row.step_ms > 0]
    if not rows:
        return None

    shown = [phase.phase for phase in view.shown_phases]
    colors = theme.of_phases(phase.phase for phase in view.report.phases)
    labels = [f"{_MARK} rank {row.rank}" if row.slowest or row.end else f"rank {row.rank}" for row in rows]
    option = blank(theme)
    option["xAxis"] = value_axis(theme, "ms")
    option["yAxis"] = {**category_axis(labels, theme), "inverse": True}
    for phase in shown:
        values = [number(dict(row.phases).get(phase, 0.0)) for row in rows]
        option["series"].append(bar_series(phase_label(phase), values, colors[phase], "step"))

    return option


def time_chart(view: RunView, theme: Theme = LIGHT) -> Option | None:
    """Return the parts of the run's wall time side by side."""
    if not view.time_parts or view.report.time is None:
        return None

    unit, seconds = next((unit, s) for unit, s in _TIME_UNITS if view.report.time.wall_s >= 2 * s or s == 1)
    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, unit), "max": number(view.report.time.wall_s / seconds)}
    option["yAxis"] = category_axis([""], theme)
    for part in view.time_parts:
        name = f"{part_words(part.part)} {duration_text(part.seconds)} ({percent_text(part.share)})"
        color = theme.worse if part.part == "hang" else theme.parts.get(part.part, theme.rule)
        option["series"].append(bar_series(name, [number(part.seconds / seconds)], color, "time"))

    return option


def heatmap_chart(heat: HeatMap, theme: Theme = LIGHT) -> Option | None:
    """Return ranks x steps: the excess of a rank's own work over the median rank's, as a share of the step."""
    if len(heat.ranks) < 2 or not len(heat.steps):
        return None

    labels = [f"rank {first}" if first == last else f"ranks {first}-{last}" for first, last in heat.ranks]
    percent = 100 * heat.excess
    cells = np.argwhere(~np.isnan(percent))
    if not len(cells):
        return None

    most = max(_MIN_HEAT_PCT, float(np.nanquantile(percent, 0.99)))
    option = blank(theme)
    option["tooltip"] = {**tooltip(theme), "trigger": "item"}
    option["xAxis"] = {**category_axis(_steps_text(heat.steps.tolist()), theme), "name": "step"}
    option["yAxis"] = rows = {**category_axis(labels, theme), "inverse": True}
    rows["axisLabel"]["interval"] = (len(labels) - 1) // _HEAT_LABELS  # of many ranks every n-th, or they touch
    option["visualMap"] = {
        "min": 0, "max": number(most), "calculable": False, "orient": "horizontal", "right": 8, "top": 0,
        "itemHeight": 90, "itemWidth": 10, "text": [f"{most:.0f} % of a step", "0"], "textGap": 6,
        "inRange": {"color": list(theme.heat)}, "textStyle": {"color": theme.muted},
    }  # fmt: skip
    data = [[int(step), int(row), number(max(percent[row, step], 0.0), 3)] for row, step in cells.tolist()]
    option["series"] = [{"name": "above the median rank, % of a step", "type": "heatmap", "data": data}]
    option["legend"]["show"] = False
    return option


def memory_chart(series: RunSeries, theme: Theme = LIGHT) -> Option | None:
    """Return resident and device memory by rank over time, in GiB; of many ranks highest, median and lowest."""
    resident, device = _few(series.memory), _few(series.device_memory)
    lines = [*(("", line) for line in resident), *(("cuda ", line) for line in device)]
    return _over_time(lines, theme, "GiB", 1 / _GIB)


def system_chart(series: RunSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the utilization of hosts and devices over time, in percent."""
    parts = (("cpu", series.cpu), ("memory", series.host_memory), ("", series.gpu), ("memory", series.gpu_memory))
    lines = [(f"{what} " if what else "", line) for what, each in parts for line in _few(each)]
    option = _over_time(lines, theme, "%", 1.0)
    if option is not None:
        option["yAxis"] |= {"min": 0, "max": 100, "interval": 25}

    return option


def metric_charts(
    series: RunSeries, theme: Theme = LIGHT, most: int = _METRICS, *, axes: bool = False
) -> list[tuple[str, Option]]:
    """Return (name, chart) of logged metrics over steps, several ranks in one chart.

    Args:
        axes: whether an option has the key `traceml` with the points' places on other axes: seconds since the first
            value of the run, and epochs where the training logs them as `epoch`.
    """
    by_name: dict[str, list[MetricSeries]] = {}
    for line in series.metrics:
        by_name.setdefault(name_without_rank(line.name), []).append(line)

    names = drawn_metrics(by_name, most, lambda name: not is_loss(name))
    charts = [(name, _metric_chart(by_name[name], theme)) for name in names]
    if axes:
        for name, option in charts:
            option["traceml"] = _other_axes(by_name[name][:_LINES], series.metrics)

    return charts


def metric_count(series: RunSeries) -> int:
    """Return the number of metrics, several ranks counted once."""
    return len({name_without_rank(line.name) for line in series.metrics}) + series.hidden_metrics


def loss_chart(series: RunSeries, theme: Theme = LIGHT) -> Option | None:
    """Return the loss and the step time over the same steps: whether a change in speed changed the training."""
    losses = [line for line in series.metrics if is_loss(line.name)]
    if not losses or not len(series.steps):
        return None

    loss = min(losses, key=lambda line: (line.name != name_without_rank(line.name), "val" in line.name, line.name))
    option = blank(theme)
    option["xAxis"] = {**value_axis(theme, "step"), "splitLine": {"show": False}}
    option["yAxis"] = [
        value_axis(theme, "ms"),
        {**value_axis(theme, "loss"), "splitLine": {"show": False}, "scale": True},
    ]
    option["grid"]["right"] = 56
    times, values = pairs(series.steps.steps, series.steps.p50_ms), pairs(loss.steps, loss.values)
    option["series"] = [
        line_series("step time p50", times, theme.lines[0], 1.5),
        {**line_series(loss.name, values, theme.lines[3], 2), "yAxisIndex": 1},
    ]
    set_ends(option)
    return option


def _metric_chart(lines: Sequence[MetricSeries], theme: Theme) -> Option:
    option = lines_over(((line.name, pairs(line.steps, line.values)) for line in lines[:_LINES]), theme, "step", "")
    option["yAxis"]["scale"] = True
    option["legend"]["show"] = len(lines) > 1
    if missing := sum(line.missing for line in lines):
        words = f"{plural(missing, 'value')} NaN or infinite"
        style = {"color": theme.muted, "fontSize": 11, "fontWeight": "normal"}
        option["title"] = {"text": words, "left": 0, "top": 22, "textStyle": style}
    elif not option["legend"]["show"]:
        option["grid"]["top"] = _BARE_TOP_PX  # nothing is above the lines

    return option


def _other_axes(lines: Sequence[MetricSeries], every: Sequence[MetricSeries]) -> dict[str, list[list[float | None]]]:
    """Return the places of the points of each line on the axes of time and of epochs."""
    began = min((float(line.epoch_s[0]) for line in every if len(line.epoch_s)), default=0.0)
    axes = {"seconds": [plain_values(line.epoch_s - began) for line in lines]}
    epochs = next((line for line in every if line.name.rpartition("/")[2] == "epoch" and len(line.steps)), None)
    if epochs is not None:
        axes["epoch"] = [plain_values(_epochs_at(line.steps, epochs)) for line in lines]

    return axes


def _epochs_at(steps: NDArray[np.float64], epochs: MetricSeries) -> NDArray[np.float64]:
    """Return the epochs of steps. Trainers log fractions of an epoch, or in each step its number."""
    starts = np.flatnonzero(np.diff(epochs.values, prepend=np.nan))
    at, values = epochs.steps[starts], epochs.values[starts]
    if 1 < len(starts) < len(epochs.steps):  # numbers: the last epoch is as long as the one before
        at, values = (np.append(each, 2 * each[-1] - each[-2]) for each in (at, values))

    return np.interp(steps, at, values)


def _over_steps(steps: Sequence[int], theme: Theme) -> Option:
    option = blank(theme)
    option["xAxis"] = {**category_axis(_steps_text(steps), theme), "name": "step", "boundaryGap": False}
    option["yAxis"] = value_axis(theme, "ms")
    return option


def _over_time(lines: Sequence[tuple[str, SampleSeries]], theme: Theme, unit: str, scale: float) -> Option | None:
    points = [(f"{what}{line.label}", pairs(line.seconds, line.values * scale)) for what, line in lines]
    return lines_over(points, theme, "s", unit) if points else None


def _few(lines: Sequence[SampleSeries]) -> tuple[SampleSeries, ...]:
    """Return the lines; of more than eight the highest, a median one and the lowest."""
    if len(lines) <= _LINES:
        return tuple(lines)

    ordered = sorted(lines, key=lambda line: float(np.nan_to_num(line.values).max(initial=0.0)))
    return ordered[-1], ordered[statistics.median_low(range(len(ordered)))], ordered[0]


def _steps_text(steps: Sequence[int]) -> list[str]:
    return [f"{step:,}" for step in steps]


def histogram_chart(items: Sequence[LoggedItem], theme: Theme = LIGHT) -> Option | None:
    """Return the share of the values per unit of value; of many steps the newest and some before it.

    Bins of different widths are comparable, as each share is divided by the width of its bin.
    """
    drawable = [item for item in items if len(item.edges) == len(item.counts) + 1 and sum(item.counts) > 0]
    if not drawable:
        return None

    chosen = np.unique(np.linspace(0, len(drawable) - 1, min(_HISTOGRAMS, len(drawable))).astype(int))
    option = lines_over(map(_line, (drawable[at] for at in reversed(chosen.tolist()))), theme, "value", "")
    option["series"][0]["lineStyle"]["width"] = 2.5
    return option


def _line(item: LoggedItem) -> tuple[str, Points]:
    edges, counts = np.asarray(item.edges), np.asarray(item.counts)
    widths = np.where(np.diff(edges) > 0, np.diff(edges), 1.0)
    name = "no step" if item.step is None else f"step {item.step:,}"
    return name, pairs((edges[:-1] + edges[1:]) / 2, counts / counts.sum() / widths)
