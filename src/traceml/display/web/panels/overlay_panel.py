"""Several runs in the same charts, and the parameters that differ between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from traceml.display.web.chart_cache import THEMES, as_json
from traceml.display.web.elements import ChartCard, Container, DataTable, TextNode, search_box, section, set_visible
from traceml.formatting import count_text, printable
from traceml.renderers.charts.comparison_charts import overlaid_metric_charts, overlaid_steps_chart
from traceml.renderers.text.compared_runs import compared_params, compared_rows
from traceml.runs.comparison.comparison_types import Comparison, run_letter
from traceml.runs.rows.series import RunSeries

__all__ = ["LETTERS", "ComparedRuns", "OverlayPanel"]

LETTERS = tuple(run_letter(number) for number in range(12))
"""Names of the compared runs in tables and charts; no more runs than this can be compared."""


@dataclass(frozen=True, slots=True)
class ComparedRuns:
    """Runs that are shown together."""

    comparisons: tuple[Comparison, ...]  # of the first run with each other one
    series: tuple[RunSeries, ...]


class OverlayPanel:
    """A table with a row per run, step times and metrics of all of them, parameters that differ.

    Args:
        names: names of the runs, the baseline first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._metrics: dict[str, ChartCard] = {}
        with Container("div", "card others") as self._summary:
            self._runs = DataTable(_COLUMNS, "the runs")

        with Container("div", "grid others"):
            self._steps = ChartCard("Step time of all runs", "median over all ranks, by step", classes="wide")

        with Container("section", "", aria_label="parameters that differ"):
            TextNode("h2", "Parameters that differ")
            with Container("div", "card"):
                columns = [("Name", "mono"), *((letter, "long") for letter in LETTERS[: len(names)])]
                self._params = DataTable(columns, "parameters that differ")
                self._same = TextNode("p", "No logged parameter differs.", "note")

        with section("metrics", "Metrics"):
            with Container("div", "toolbar"):
                search_box("metrics", "metric-parts")

            self._grid = Container("div", "grid three", id="metric-parts")
            self._none = TextNode("p", "None of these runs logged a metric.", "note card")

        several = len(names) > 2
        set_visible(self._summary, several)
        self._steps.visible(several)

    def show(self, runs: ComparedRuns, theme: str) -> list[str | None]:
        """Show the current comparison; return the charts that the browser has to draw."""
        self._runs.show(_rows(runs, self._names))
        params = compared_params(runs.comparisons)
        self._params.show([[printable(name), *map(printable, values)] for name, values in params])
        set_visible(self._same, not params)
        lines = list(zip(LETTERS, runs.series, strict=False))  # not by id: two ids are wider than a chart
        charts = overlaid_metric_charts(lines, THEMES[theme])
        set_visible(self._none, not charts)
        steps = overlaid_steps_chart([(letter, each.steps) for letter, each in lines], THEMES[theme])
        return [
            self._steps.show(as_json(steps)),
            *(self._metric(name).show(as_json(option)) for name, option in charts),
        ]

    def _metric(self, name: str) -> ChartCard:
        if name not in self._metrics:
            with self._grid:
                self._metrics[name] = ChartCard(printable(name), classes="low", words=name)

        return self._metrics[name]


_COLUMNS = (
    ("Letter", ""),
    ("Run", "long"),
    ("Verdict", ""),
    ("Steps", "n"),
    ("Mean step", "n"),
    ("Change", "n"),
    ("Significant", "n"),
    ("Notes", "long"),
)


def _rows(runs: ComparedRuns, names: Sequence[str]) -> list[list[str]]:
    cells = [
        [
            row.letter,
            name,
            row.side.verdict,
            count_text(row.side.steps),
            row.step,
            row.change or "-",
            row.significant or "-",
            "; ".join(row.notes),
        ]
        for name, row in zip(names, compared_rows(runs.comparisons), strict=True)
    ]
    return [[printable(cell) for cell in row] for row in cells]
