"""A run's page: what limits it first, then the charts that show it, then everything that is known."""

from __future__ import annotations

from nicegui import Client

from traceml.display.web.followed import RunState
from traceml.display.web.frame import Banner, draw, keys_dialog, top_bar
from traceml.display.web.parts import Block, Words, link, shown
from traceml.display.web.run_charts import RunCharts
from traceml.display.web.run_details import Delivery, Logs, RankTable, Telemetry
from traceml.display.web.verdict_card import Findings, VerdictCard
from traceml.renderers.numbers import duration_text
from traceml.renderers.views import RunView

__all__ = ["RunPage"]

_TABS = (
    ("verdict", "Verdict"),
    ("steps", "Steps"),
    ("ranks", "Ranks"),
    ("machine", "Memory and system"),
    ("metrics", "Metrics"),
    ("logs", "Logs"),
    ("delivery", "Delivery"),
    ("telemetry", "Telemetry"),
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
        with Block("div", "page", id="content", tabindex="-1"):
            with Block("div", "card nothing") as self._nothing:
                self._why = Words("h2", "")
                self._hint = Words("p", "")
                with Block("p"):
                    link("All runs", "/")

            with Block("div") as self._body:
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
        with Block("section", "", id="verdict", aria_label="verdict"):
            self._verdict = VerdictCard()
            self._findings = Findings()

        self._charts = RunCharts()
        with self._charts.below_ranks:
            self._rank_table = RankTable()

        with Block("section", "", id="logs", aria_label="logs"):
            Words("h2", "Logs")
            self._logs = Logs()

        with Block("div", "grid"):
            with Block("section", "", id="delivery", aria_label="delivery"):
                Words("h2", "Delivery to trackers")
                self._delivery = Delivery()

            with Block("section", "", id="telemetry", aria_label="telemetry"):
                Words("h2", "Telemetry")
                self._telemetry = Telemetry()

    def _show_run(self, state: RunState, view: RunView) -> None:
        self._crumb.say(view.run.name)
        shown(self._crumb, True)
        self._verdict.show(view, state.report or {})
        self._findings.show(view)
        self._rank_table.show(view)
        self._logs.show(state)
        self._delivery.show(view, state.report or {})
        self._telemetry.show(view, state.report or {})
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
