"""A run's page: what limits it first, then the charts that show it, then everything that is known."""

from __future__ import annotations

from nicegui import Client

from traceml.display.web.chart_section import ChartSection
from traceml.display.web.elements import Container, TextNode, link, shown
from traceml.display.web.layout import Banner, draw, keys_dialog, top_bar
from traceml.display.web.run_details import DeliverySection, LogSection, RankTable, TelemetrySection
from traceml.display.web.run_sources import RunState
from traceml.display.web.verdict_card import FindingSection, VerdictCard
from traceml.formatting import duration_text
from traceml.renderers.views import RunView

__all__ = ["RunPage"]

_TABS = (
    ("verdict", "Verdict"),
    ("steps", "Steps"),
    ("ranks", "Ranks"),
    ("machine", "Memory and system"),
    ("metrics", "Metrics"),
    ("logs", "LogSection"),
    ("delivery", "DeliverySection"),
    ("telemetry", "TelemetrySection"),
)


class RunPage:
    """A run, in one browser.

    Args:
        client: the browser.
        run_id: the run's folder.
        theme: what the browser had last.
    """

    def __init__(self, client: Client, run_id: str, theme: str) -> None:
        self._client, self._theme = client, theme
        self._state: RunState | None = None
        self._crumb = top_bar(run_id, _TABS)
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            with Container("div", "card nothing") as self._nothing:
                self._why = TextNode("h2", "")
                self._hint = TextNode("p", "")
                with Container("p"):
                    link("All runs", "/")

            with Container("div") as self._body:
                self._build()

        keys_dialog()
        shown(self._nothing, False)

    def show(self, state: RunState) -> None:
        """Show the run as it stands."""
        self._state = state
        with self._client:
            self._banner.say(_warning(state))
            shown(self._nothing, state.view is None)
            shown(self._body, state.view is not None)
            if state.view is None:
                self._say_why_not(state)
            else:
                self._show_run(state, state.view)

    def set_theme(self, theme: str) -> None:
        """Draw in other colours."""
        if theme != self._theme:
            self._theme = theme
            if self._state is not None and self._state.view is not None:
                with self._client:
                    draw(self._client, self._charts.show(self._state, theme))

    def _build(self) -> None:
        with Container("section", "", id="verdict", aria_label="verdict"):
            self._verdict = VerdictCard()
            self._findings = FindingSection()

        self._charts = ChartSection()
        with self._charts.below_ranks:
            self._rank_table = RankTable()

        with Container("section", "", id="logs", aria_label="logs"):
            TextNode("h2", "LogSection")
            self._logs = LogSection()

        with Container("div", "grid"):
            with Container("section", "", id="delivery", aria_label="delivery"):
                TextNode("h2", "DeliverySection to trackers")
                self._delivery = DeliverySection()

            with Container("section", "", id="telemetry", aria_label="telemetry"):
                TextNode("h2", "TelemetrySection")
                self._telemetry = TelemetrySection()

    def _show_run(self, state: RunState, view: RunView) -> None:
        self._crumb.say(view.run.name)
        shown(self._crumb, True)
        self._verdict.show(view)
        self._findings.show(view)
        self._rank_table.show(view)
        self._logs.show(state)
        self._delivery.show(view)
        self._telemetry.show(view)
        draw(self._client, self._charts.show(state, self._theme))

    def _say_why_not(self, state: RunState) -> None:
        if state.problem:
            self._why.say("This run cannot be read")
            self._hint.say("It is tried again every few seconds.")
        elif state.exists:
            self._why.say("Waiting for the first rows")
            self._hint.say("The run has been created; its page fills by itself as soon as a rank reports.")
        else:
            self._why.say("There is no such run")
            self._hint.say("It may have been removed, or not have started yet: then this page fills by itself.")


def _warning(state: RunState) -> str:
    if state.problem:
        return state.problem

    if not state.watched:
        return "The aggregator of this run ended before the run did: what you see is what had been stored."

    if state.silent_s is not None:
        silent = duration_text(float(round(state.silent_s)))
        return f"Nothing has come from this run for {silent}: its ranks are silent, or its aggregator is."

    return ""
