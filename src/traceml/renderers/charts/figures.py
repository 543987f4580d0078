"""Charts of the report page and the notebook: order, titles, notes."""

from __future__ import annotations

import math

import msgspec

from traceml.formatting import count_text, ms_text, name_without_rank
from traceml.renderers.charts import run_charts
from traceml.renderers.charts.chart_options import Option
from traceml.renderers.charts.palette import BY_CSS
from traceml.renderers.charts.svg import draw
from traceml.renderers.views import RunView
from traceml.runs.rows.metrics import OWN_LOSS
from traceml.runs.rows.series import RunSeries

__all__ = ["DRAWN_METRICS", "Figure", "figures"]

_WIDTH = 500
DRAWN_METRICS = 12
"""Number of logged metrics that have a chart."""
_ROW = 22  # height of a rank's bar
_MAX_HEIGHT = 620


class Figure(msgspec.Struct, frozen=True):
    """A chart with its title and a line on how to read it; `height` is in units of 1/500 of its width."""

    title: str
    note: str
    option: Option
    height: int

    @property
    def svg(self) -> str:
        """The drawing."""
        return draw(self.option, self.title, width=_WIDTH, height=self.height)


def figures(view: RunView, series: RunSeries) -> list[Figure]:
    """Return the charts that have data."""
    steps, heat = series.steps, series.heat
    each = "one step per point" if steps.width == 1 else f"{steps.width:,} steps per point"
    ranks = run_charts.ranks_chart(view, BY_CSS)
    metrics = run_charts.metric_charts(series, BY_CSS, DRAWN_METRICS)
    candidates = [
        ("Where the run's time went", "Wall time from start to end, the mean of all ranks.",
         run_charts.time_chart(view, BY_CSS), 130),
        ("Step time", f"Percentiles over all ranks, {each}{_longest(series)}.",
         run_charts.step_time_chart(steps, BY_CSS), 250),
        ("Where a step goes", f"Mean of each phase, stacked, {each}.", run_charts.phases_chart(steps, BY_CSS), 250),
        ("Ranks", "Mean step of each rank; comm is waiting for others.", ranks, _height(ranks)),
        ("Slow ranks", "A rank's own work above the median rank's, as a share of the step.",
         run_charts.heatmap_chart(heat, BY_CSS), 120 + min(26 * len(heat.ranks), 420)),
        ("Loss and step time", "Whether a change in speed changed the training.",
         run_charts.loss_chart(series, BY_CSS), 250),
        ("Memory", "Of each rank; of many ranks the highest, the median and the lowest.",
         run_charts.memory_chart(series, BY_CSS), 220),
        ("Hosts and devices", "Utilization.", run_charts.system_chart(series, BY_CSS), 220),
        *((name, _logged(name, series), option, 200) for name, option in metrics),
    ]  # fmt: skip
    return [Figure(title, note, option, height) for title, note, option, height in candidates if option is not None]


def _longest(series: RunSeries) -> str:
    longest = max((value for value in series.steps.max_ms.tolist() if math.isfinite(value)), default=None)
    return f"; the longest step took {ms_text(longest)}" if longest is not None else ""


def _logged(name: str, series: RunSeries) -> str:
    missing = sum(line.missing for line in series.metrics if name_without_rank(line.name) == name)
    source = "Read from each backward pass." if name == OWN_LOSS else "Logged by the training."
    return f"{count_text(missing)} values are not finite numbers." if missing else source


def _height(ranks: Option | None) -> int:
    rows = len(ranks["yAxis"]["data"]) if ranks is not None else 0
    return min(max(250 if rows > 6 else 110 + _ROW * rows, 70 + _ROW * rows), _MAX_HEIGHT)
