"""A run's charts as JSON for the browser, made once per theme."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from traceml.renderers.charts import run_charts
from traceml.renderers.charts.chart_options import Option
from traceml.renderers.charts.palette import DARK, LIGHT

if TYPE_CHECKING:
    from traceml.renderers.views import RunView
    from traceml.runs.rows.series import RunSeries

__all__ = ["THEMES", "ChartCache", "as_json"]

THEMES = {"light": LIGHT, "dark": DARK}
METRIC = "metric:"
METRICS = 60
"""Most charts of metrics; a browser draws more of them too slowly."""


class ChartCache:
    """The charts of a run at one moment, by theme; made on first use, in any thread."""

    def __init__(self, view: RunView, series: RunSeries | None) -> None:
        self._view, self._series = view, series
        self._made: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    @property
    def metrics(self) -> int:
        """Number of metrics, with and without a chart."""
        return 0 if self._series is None else run_charts.metric_count(self._series)

    def of(self, theme: str) -> dict[str, str]:
        """Return the charts as JSON by name; those of metrics under `metric:` and their name."""
        with self._lock:
            if theme not in self._made:
                self._made[theme] = self._draw(theme)

            return self._made[theme]

    def _draw(self, name: str) -> dict[str, str]:
        theme, series = THEMES[name], self._series
        options: dict[str, Option | None] = {
            "time": run_charts.time_chart(self._view, theme),
            "ranks": run_charts.ranks_chart(self._view, theme),
        }
        if series is not None:
            options |= {
                "steps": run_charts.step_time_chart(series.steps, theme),
                "phases": run_charts.phases_chart(series.steps, theme),
                "heat": run_charts.heatmap_chart(series.heat, theme),
                "memory": run_charts.memory_chart(series, theme),
                "system": run_charts.system_chart(series, theme),
                "loss": run_charts.loss_chart(series, theme),
            }
            metrics = run_charts.metric_charts(series, theme, METRICS, axes=True)
            options |= {f"{METRIC}{metric}": option for metric, option in metrics}

        return {chart: text for chart, option in options.items() if (text := as_json(option)) is not None}


def as_json(option: Option | None) -> str | None:
    """Return an option as ASCII JSON, which is also a JavaScript literal; None if there is no chart."""
    return None if option is None else json.dumps(_fitted(option), separators=(",", ":"), allow_nan=False)


def _fitted(option: Option) -> Option:
    """Return the option with the x axis as ECharts needs it: its name below, no label at a fractional end."""
    axis = dict(option["xAxis"])
    if axis.get("name"):
        axis |= {"nameLocation": "middle", "nameGap": 25}
        option = {**option, "grid": {**option["grid"], "bottom": 24}}

    if axis["type"] == "value":
        whole = float(axis.get("min") or 0).is_integer()
        axis["axisLabel"] = {**axis["axisLabel"], "showMinLabel": whole, "showMaxLabel": False}

    return {**option, "xAxis": axis}
