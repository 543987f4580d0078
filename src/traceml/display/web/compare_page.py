"""Two runs side by side: whether B is slower, by how much, whether that is significant, and the cause."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nicegui import Client

from traceml.display.web.chart_cache import THEMES, as_json
from traceml.display.web.elements import ChartCard, Container, DataTable, TextNode, link, run_path, set_visible
from traceml.display.web.layout import Banner, draw, keys_dialog, top_bar
from traceml.display.web.run_sources import RunFileTimes
from traceml.errors import StoreError
from traceml.formatting import bytes_text, count_text, ms_text
from traceml.renderers.charts.comparison_charts import compared_phases_chart, compared_ranks_chart, compared_steps_chart
from traceml.renderers.text.comparison import (
    change_text,
    compared_headline,
    compared_sentences,
    interval_text,
    step_change_text,
)
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.comparison_types import Comparison, StatisticChange
from traceml.runs.rows.series import StepSeries, read_series

__all__ = ["ComparePage", "CompareSource", "CompareState"]

_WEIGHTS = {"slower": "critical", "faster": "info", "same": "", "unknown": "warning"}
_ROW_PX, _FRAME_PX, _LEAST_PX, _MOST_PX = 40, 90, 236, 640


@dataclass(frozen=True, slots=True)
class CompareState:
    """A comparison, or the reason why there is none."""

    comparison: Comparison | None = None
    steps: tuple[StepSeries, StepSeries] | None = None
    problem: str = ""


class CompareSource:
    """Compares two runs, again each time one of them changes.

    Args:
        a: folder of the baseline run.
        b: folder of the other run.
    """

    def __init__(self, a: Path, b: Path) -> None:
        self._runs = (a, b)
        self._written = (RunFileTimes(a), RunFileTimes(b))

    def __repr__(self) -> str:
        return f"CompareSource({self._runs[0].name}, {self._runs[1].name})"

    def read(self) -> CompareState | None:
        """Return the current comparison; None when neither run has changed."""
        changed = [written.changed() for written in self._written]
        if not any(changed):
            return None

        missing = [run.name for run in self._runs if not run.is_dir()]
        if missing:
            return CompareState(problem=f"There is no run {' nor '.join(missing)}.")

        try:
            comparison = compare_runs(*self._runs)
            first, second = (read_series(run).steps for run in self._runs)
        except StoreError as error:
            return CompareState(problem=str(error))

        return CompareState(comparison, (first, second))

    def close(self) -> None:
        """Do nothing: no file stays open."""


class ComparePage:
    """A comparison, in one browser.

    Args:
        client: the browser.
        a: id of the baseline run.
        b: id of the other run.
        theme: the one that the browser used last.
    """

    def __init__(self, client: Client, a: str, b: str, theme: str) -> None:
        self._client, self._theme = client, theme
        self._state: CompareState | None = None
        top_bar("compare")
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            self._waiting = TextNode("p", "Reading both runs", "card empty-state")
            with Container("div") as self._body:
                self._verdict(a, b)
                with Container("div", "grid others"):
                    self._steps = ChartCard("Step time", "median over all ranks, by step", classes="wide")
                    self._phases = ChartCard("Phases", "mean of all ranks; the largest change first")
                    self._ranks = ChartCard("Each rank's own work", "without waiting for others")

                with Container("div", "grid others"):
                    with Container("div", "card"):
                        self._times = DataTable(_TIME_COLUMNS, "step time")

                    with Container("div", "card"):
                        self._facts = DataTable((("", ""), ("A", "n"), ("B", "n"), ("Change", "n")), "the two runs")

        keys_dialog()
        set_visible(self._body, False)

    def show(self, state: CompareState) -> None:
        """Show the current comparison."""
        self._state = state
        with self._client:
            self._banner.show(state.problem)
            set_visible(self._waiting, False)
            set_visible(self._body, state.comparison is not None)
            if state.comparison is not None:
                self._show(state.comparison)

    def set_theme(self, theme: str) -> None:
        """Change the colors."""
        if theme != self._theme:
            self._theme = theme
            if self._state is not None:
                self.show(self._state)

    def _verdict(self, a: str, b: str) -> None:
        with Container("div", "card verdict single") as self._card, Container("div", "statement"):
            with Container("div", "tags"):
                self._outcome = TextNode("span", "", "pill kind")
                for side, run_id in (("A", a), ("B", b)):
                    TextNode("b", side)
                    link(run_id, run_path(run_id), "mono")

            self._headline = TextNode("h1")
            self._details = TextNode("p", "", "summary")
            self._notes = TextNode("p", "", "summary notes")

    def _show(self, comparison: Comparison) -> None:
        weight = _WEIGHTS.get(comparison.outcome, "")
        self._card.set_classes(f"card verdict single {weight}")
        self._outcome.set_text(comparison.outcome.upper())
        self._outcome.set_classes(f"pill kind {weight}")
        self._headline.set_text(compared_headline(comparison))
        self._details.set_text(" ".join(compared_sentences(comparison)))
        notes = [*comparison.obstacles, *comparison.remarks]
        self._notes.set_text("Note: " + "; ".join(notes) + "." if notes else "")
        self._times.show([_time_cells(name, row) for name, row in comparison.step_time.items()])
        self._facts.show(_fact_rows(comparison))
        self._draw(comparison)

    def _draw(self, comparison: Comparison) -> None:
        theme = THEMES[self._theme]
        rows = max(len(comparison.phases), len(comparison.ranks))
        height = min(max(_FRAME_PX + _ROW_PX * rows, _LEAST_PX), _MOST_PX)
        steps = self._state.steps if self._state is not None else None
        options = (
            (self._steps, compared_steps_chart(*steps, theme) if steps is not None else None),
            (self._phases, compared_phases_chart(comparison, theme)),
            (self._ranks, compared_ranks_chart(comparison, theme)),
        )
        for chart in (self._phases, self._ranks):
            chart.height(height)

        drawn = [chart.show(None if option is None else as_json(option)) for chart, option in options]
        draw(self._client, [each for each in drawn if each is not None])


_TIME_COLUMNS = (
    ("Step time", ""),
    ("A", "n"),
    ("B", "n"),
    ("Change", "n"),
    ("99 % between", "n"),
    ("Significant", "n"),
)


def _time_cells(name: str, row: StatisticChange) -> list[str]:
    between = interval_text(row.low, row.high)
    real = {True: "yes", False: "no", None: "unknown"}[row.real]
    sure = "" if row.p is None else f", p = {row.p:.2g}"
    return [name, ms_text(row.a_ms), ms_text(row.b_ms), step_change_text(row), between, real + sure]


def _fact_rows(comparison: Comparison) -> list[list[str]]:
    a, b = comparison.a, comparison.b
    rows = [
        ["verdict", a.verdict, b.verdict, ""],
        ["state", a.state, b.state, ""],
        ["ranks", count_text(a.world_size), count_text(b.world_size), ""],
        ["steps", count_text(a.steps), count_text(b.steps), ""],
    ]
    for what, row in comparison.memory.items():
        rows.append([what, bytes_text(row.a), bytes_text(row.b), change_text(row.change)])

    return rows
