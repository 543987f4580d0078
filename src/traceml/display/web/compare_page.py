"""Two runs side by side: whether B is slower, by how much, whether that is significant; several in one chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nicegui import Client

from traceml.display.web.chart_cache import THEMES, as_json
from traceml.display.web.elements import (
    ChartCard,
    Container,
    DataTable,
    TextNode,
    link,
    run_path,
    set_classes,
    set_visible,
    top_heading,
)
from traceml.display.web.layout import Banner, draw, top_bar
from traceml.display.web.panels.overlay_panel import LETTERS, ComparedRuns, OverlayPanel
from traceml.errors import StoreError
from traceml.formatting import bytes_text, count_text, duration_text, ms_text, part_words
from traceml.renderers.charts.comparison_charts import compared_phases_chart, compared_ranks_chart, compared_steps_chart
from traceml.renderers.text.comparison import (
    change_text,
    compared_headline,
    compared_sentences,
    significance_text,
    step_time_rows,
)
from traceml.renderers.views import visible_parts
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.comparison_types import Comparison, run_letter
from traceml.runs.report.report_types import TimeSection
from traceml.runs.rows.series import read_series
from traceml.runs.runs_source import RunFileTimes

__all__ = ["ComparePage", "CompareSource", "CompareState"]

_WEIGHTS = {"slower": "critical", "faster": "info", "same": "", "unknown": "warning"}
_ROW_PX, _FRAME_PX, _MIN_PX, _MAX_PX = 40, 90, 236, 640


@dataclass(frozen=True, slots=True)
class CompareState:
    """The compared runs, or the reason why there are none."""

    runs: ComparedRuns | None = None
    problem: str = ""


class CompareSource:
    """Compares runs with the first of them, again each time one of them changes.

    Args:
        runs: folders of the runs, the baseline first.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = tuple(runs)
        self._written = [RunFileTimes(run) for run in runs]

    def __repr__(self) -> str:
        return f"CompareSource({', '.join(run.name for run in self._runs)})"

    def read(self) -> CompareState | None:
        """Return the current comparison; None when no run has changed."""
        changed = [written.take_change() for written in self._written]
        if not any(changed):
            return None

        missing = [run.name for run in self._runs if not run.is_dir()]
        if missing:
            return CompareState(problem=f"There is no run {' nor '.join(missing)}.")

        try:
            comparisons = [
                compare_runs(self._runs[0], run, run_letter(number)) for number, run in enumerate(self._runs[1:], 1)
            ]
            series = [read_series(run) for run in self._runs]
        except StoreError as error:
            return CompareState(problem=str(error))

        return CompareState(ComparedRuns(tuple(comparisons), tuple(series)))

    def close(self) -> None:
        """Do nothing: no file stays open."""


class ComparePage:
    """A comparison, in one browser.

    Args:
        runs: ids of the runs, the baseline first.
        theme: the one that the browser used last.
    """

    def __init__(self, client: Client, runs: Sequence[str], theme: str) -> None:
        self._client, self._theme = client, theme
        self._state: CompareState | None = None
        top_bar("compare")
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            with Container("div", "card empty-state") as self._empty_state:
                self._reason = top_heading("Reading the runs")

            with Container("div") as self._body:
                self._verdict(runs)
                TextNode("h2", "Charts and figures", "visually-hidden")
                with Container("div", "grid others") as self._pair_charts:
                    self._steps = ChartCard("Step time", "median over all ranks, by step", classes="wide")
                    self._phases = ChartCard("Phases", "mean of all ranks; the largest change first")
                    self._ranks = ChartCard("Each rank's own work", "without waiting for others")

                with Container("div", "grid others") as self._pair_tables:
                    with Container("div", "card"):
                        self._times = DataTable(_TIME_COLUMNS, "step time")

                    with Container("div", "card"):
                        self._facts = DataTable(
                            (("Figure", ""), ("A", "n"), ("B", "n"), ("Change", "n")), "the two runs"
                        )

                self._overlay = OverlayPanel(runs)

        set_visible(self._body, False)
        for part in (self._pair_charts, self._pair_tables):
            set_visible(part, len(runs) == 2)

    def show(self, state: CompareState) -> None:
        """Show the current comparison."""
        self._state = state
        with self._client:
            self._banner.show(state.problem)
            self._reason.set_text("These runs cannot be compared")
            set_visible(self._empty_state, state.runs is None)
            set_visible(self._body, state.runs is not None)
            if state.runs is not None:
                self._show(state.runs)

    def set_theme(self, theme: str) -> None:
        """Change the colors."""
        if theme != self._theme:
            self._theme = theme
            if self._state is not None:
                self.show(self._state)

    def _verdict(self, runs: Sequence[str]) -> None:
        with Container("div", "card verdict single") as self._card, Container("div", "statement"):
            with Container("div", "tags"):
                self._outcome = TextNode("span", "", "pill kind")
                for side, run_id in zip(LETTERS, runs, strict=False):
                    with Container("span", "side"):
                        TextNode("b", side)
                        link(run_id, run_path(run_id), "mono")

            self._headline = TextNode("h1")
            self._details = TextNode("p", "", "summary")
            self._notes = TextNode("p", "", "summary notes")

    def _show(self, runs: ComparedRuns) -> None:
        overlaid = self._overlay.show(runs, self._theme)
        if len(runs.comparisons) == 1:
            self._show_pair(runs.comparisons[0])
            overlaid += self._pair_drawings(runs)
        else:
            self._outcome.set_text(f"{len(runs.series)} RUNS")
            self._headline.set_text(several_headline(runs.comparisons))

        draw(self._client, overlaid)

    def _show_pair(self, comparison: Comparison) -> None:
        weight = _WEIGHTS.get(comparison.outcome, "")
        set_classes(self._card, f"card verdict single {weight}")
        self._outcome.set_text(comparison.outcome.upper())
        set_classes(self._outcome, f"pill kind {weight}")
        self._headline.set_text(compared_headline(comparison))
        self._details.set_text(" ".join(compared_sentences(comparison)))
        notes = "; ".join(comparison.notes)
        self._notes.set_text(f"Note: {notes}." if notes else "")
        self._times.show(_time_rows(comparison))
        self._facts.show(_fact_rows(comparison))

    def _pair_drawings(self, runs: ComparedRuns) -> list[str | None]:
        theme, comparison = THEMES[self._theme], runs.comparisons[0]
        rows = max(len(comparison.phases), len(comparison.ranks))
        height = min(max(_FRAME_PX + _ROW_PX * rows, _MIN_PX), _MAX_PX)
        first, second = (each.steps for each in runs.series)
        options = (
            (self._steps, compared_steps_chart(first, second, theme)),
            (self._phases, compared_phases_chart(comparison, theme)),
            (self._ranks, compared_ranks_chart(comparison, theme)),
        )
        for chart in (self._phases, self._ranks):
            chart.height(height)

        return [chart.show(as_json(option)) for chart, option in options]


def several_headline(comparisons: Sequence[Comparison]) -> str:
    """Return how many runs are slower or faster than the first, in a sentence."""
    counts = Counter(map(_outcome_words, comparisons))
    return f"Compared with A: {', '.join(f'{count} {words}' for words, count in counts.items())}"


def _outcome_words(comparison: Comparison) -> str:
    if comparison.outcome != "unknown":
        return "not significantly different" if comparison.outcome == "same" else comparison.outcome

    if not comparison.obstacles:
        return "with too few steps to tell"

    has_test = comparison.judged.p is not None
    return "where the machine may be the difference" if has_test else "not comparable"


_TIME_COLUMNS = (
    ("Step time", ""),
    ("A", "n"),
    ("B", "n"),
    ("Change", "n"),
    ("99 % between", "n"),
    ("Significant", "n"),
)


def _time_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [name, ms_text(row.a_ms), ms_text(row.b_ms), change, between, significance_text(row)]
        for name, row, change, between in step_time_rows(comparison)
    ]


def _fact_rows(comparison: Comparison) -> list[list[str]]:
    a, b = comparison.a, comparison.b
    rows = [
        ["verdict", a.verdict, b.verdict, ""],
        ["state", a.state, b.state, ""],
        ["ranks", count_text(a.world_size), count_text(b.world_size), ""],
        ["steps", count_text(a.steps), count_text(b.steps), ""],
    ]
    rows += _wall_time_rows(a.time, b.time)
    for what, row in comparison.memory.items():
        if row.a or row.b:  # a training without a device has no device memory
            rows.append([what, bytes_text(row.a), bytes_text(row.b), change_text(row.change)])

    return rows


def _wall_time_rows(a: TimeSection | None, b: TimeSection | None) -> list[list[str]]:
    """Return the wall time of both runs, and its parts."""
    if a is None or b is None:
        return []

    first, second = ({part.part: part.seconds for part in visible_parts(time)} for time in (a, b))
    seconds = [("wall time", a.wall_s, b.wall_s)]
    seconds += [(part_words(part), first.get(part, 0.0), second.get(part, 0.0)) for part in {**first, **second}]
    return [[what, duration_text(before), duration_text(after), ""] for what, before, after in seconds]
