"""Charts of logged histograms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traceml.renderers.charts.chart_options import (
    Option,
    Points,
    lines_over,
    pairs,
)
from traceml.renderers.charts.palette import LIGHT, Theme
from traceml.runs.rows.logged_media import LoggedItem

__all__ = ["histogram_chart"]

_LINES = 5


def histogram_chart(items: Sequence[LoggedItem], theme: Theme = LIGHT) -> Option | None:
    """Return the share of the values per unit of value; of many steps the newest and some before it.

    Bins of different widths are comparable, as each share is divided by the width of its bin.
    """
    drawable = [item for item in items if len(item.edges) == len(item.counts) + 1 and sum(item.counts) > 0]
    if not drawable:
        return None

    chosen = np.unique(np.linspace(0, len(drawable) - 1, min(_LINES, len(drawable))).astype(int))
    option = lines_over(map(_line, (drawable[at] for at in reversed(chosen.tolist()))), theme, "value", "")
    option["series"][0]["lineStyle"]["width"] = 2.5
    return option


def _line(item: LoggedItem) -> tuple[str, Points]:
    edges, counts = np.asarray(item.edges), np.asarray(item.counts)
    widths = np.where(np.diff(edges) > 0, np.diff(edges), 1.0)
    name = "no step" if item.step is None else f"step {item.step:,}"
    return name, pairs((edges[:-1] + edges[1:]) / 2, counts / counts.sum() / widths)
