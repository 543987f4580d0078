"""A run's page: its verdict first, then charts, then all details."""

from __future__ import annotations

from pathlib import Path

from nicegui import Client

from traceml.display.web.chart_panel import ChartPanel
from traceml.display.web.elements import Container, TextNode, link, section, set_classes, set_visible, top_heading
from traceml.display.web.layout import Banner, draw, top_bar
from traceml.display.web.panels.log_panel import LogPanel
from traceml.display.web.panels.media_panel import MediaPanel
from traceml.display.web.panels.overview_panel import OverviewPanel
from traceml.display.web.run_details import DeliveryPanel, LinePanel, RankTable, TelemetryPanel
from traceml.display.web.run_sources import RunState
from traceml.display.web.verdict_card import FindingsPanel, VerdictCard
from traceml.formatting import duration_text, printable
from traceml.renderers.views import RunView

__all__ = ["RunPage"]

_TABS = (
    ("verdict", "Verdict"),
    ("steps", "Steps"),
    ("ranks", "Ranks"),
    ("machine", "Memory and system"),
    ("metrics", "Metrics"),
    ("media", "Media and files"),
    ("overview", "Overview"),
    ("lines", "Lines"),
    ("logs", "Logs"),
    ("delivery", "Delivery"),
    ("telemetry", "Telemetry"),
)


class RunPage:
    """A run, in one browser."""

    def __init__(self, client: Client, run_dir: Path, theme: str) -> None:
        self._client, self._run_dir, self._theme = client, run_dir, theme
        self._state: RunState | None = None
        self._crumb, self._sections = top_bar(run_dir.name, _TABS)
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            with Container("div", "card empty-state") as self._empty_state:
                self._reason = top_heading("")
                self._hint = TextNode("p", "")
                with Container("p"):
                    link("All runs", "/")

            # Until the run is read, the body takes its place only, so that an anchor and the reader stay there: its
            # empty parts would tell that nothing was logged.
            with Container("div", "unread") as self._body:
                self._build()

        self._banner.show("Reading the run ...")
        set_visible(self._empty_state, False)

    def show(self, state: RunState) -> None:
        """Show the current state of the run."""
        self._state = state
        with self._client:
            set_classes(self._body, "")
            self._banner.show(_warning(state))
            set_visible(self._empty_state, state.view is None)
            for part in (self._sections, self._body):
                set_visible(part, state.view is not None)

            if state.view is None:
                self._explain_absence(state)
            else:
                self._show_run(state, state.view)

    def set_theme(self, theme: str) -> None:
        """Change the colors."""
        if theme != self._theme:
            self._theme = theme
            if self._state is not None and self._state.view is not None:
                with self._client:
                    self._draw(self._state)

    def _build(self) -> None:
        with Container("section", "", id="verdict", aria_label="verdict"):
            self._verdict = VerdictCard()
            self._findings = FindingsPanel()

        self._charts = ChartPanel()
        with self._charts.below_ranks:
            self._rank_table = RankTable()

        with section("media", "Media and files"):
            self._media = MediaPanel(self._run_dir.name)

        with section("overview", "Overview"):
            self._overview = OverviewPanel(self._run_dir.name)

        with section("lines", "Lines of code"):
            self._lines = LinePanel()

        with section("logs", "Logs"):
            self._logs = LogPanel(self._client, self._run_dir)

        with Container("div", "grid"):
            with section("delivery", "Delivery to trackers", "delivery"):
                self._delivery = DeliveryPanel()

            with section("telemetry", "Telemetry"):
                self._telemetry = TelemetryPanel()

    def _show_run(self, state: RunState, view: RunView) -> None:
        self._crumb.set_text(printable(state.labels.name or view.report.run.name))
        set_visible(self._crumb, True)
        self._verdict.show(view)
        self._findings.show(view)
        self._rank_table.show(view)
        self._lines.show(view)
        self._logs.show(state)
        self._delivery.show(view, state.about)
        self._telemetry.show(view)
        self._overview.show(state, view)
        self._draw(state)

    def _draw(self, state: RunState) -> None:
        drawn = [*self._charts.show(state, self._theme), *self._media.show(state, self._theme)]
        draw(self._client, drawn)

    def _explain_absence(self, state: RunState) -> None:
        if state.problem:
            self._reason.set_text("This run cannot be read")
            self._hint.set_text("The page tries again every few seconds.")
        elif state.exists:
            self._reason.set_text("Waiting for the first rows")
            self._hint.set_text("The run has been created; this page updates as soon as a rank reports.")
        else:
            self._reason.set_text("There is no such run")
            self._hint.set_text("It may have been removed. If it starts later, this page updates.")


def _warning(state: RunState) -> str:
    if state.problem:
        return state.problem

    if not state.watched:
        return "The aggregator of this run ended before the run did: this page shows what was stored until then."

    if state.silent_s is not None:
        silent = duration_text(float(round(state.silent_s)))
        return f"No data from this run for {silent}: its ranks or its aggregator do not respond."

    return ""
