"""The list of runs, newest first, with search and a choice of two to compare."""

from __future__ import annotations

import time
from pathlib import Path

from nicegui import Client

from traceml.display.web.elements import Container, TextNode, link, run_path, set_visible
from traceml.display.web.layout import Banner, keys_dialog, top_bar
from traceml.display.web.run_sources import RunsState
from traceml.formatting import bytes_text, duration_text, rate_text
from traceml.runs.find import RunInfo

__all__ = ["RunsPage"]

_SHOWN = 500


class RunsPage:
    """The list, in one browser.

    Args:
        client: the browser.
        runs_dir: shown where there are no runs.
    """

    def __init__(self, client: Client, runs_dir: Path) -> None:
        self._client = client
        self._rows: dict[str, _RunRow] = {}
        top_bar()
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            with Container("div", "head"):
                TextNode("h1", "Runs")
                search = {"type": "search", "placeholder": "Search name, state, verdict", "aria_label": "search runs"}
                Container("input", "search", id="search", autocomplete="off", **search)
                TextNode("button", "Compare two", "tool main", id="compare", type="button", disabled=True)

            with Container("div", "card runs") as self._card:
                self._table()

            self._more = TextNode("p", "", "note")
            with Container("div", "card empty-state") as self._empty_state:
                TextNode("h2", "No runs yet")
                TextNode("p", f"They appear here as soon as one starts in {runs_dir}.")
                TextNode("code", "traceml run train.py")

        keys_dialog()

    def show(self, state: RunsState) -> None:
        """Show the current list."""
        with self._client:
            self._banner.show(state.problem)
            runs = state.runs[:_SHOWN]
            set_visible(self._empty_state, not runs and not state.problem)
            set_visible(self._card, bool(runs))
            hidden = len(state.runs) - len(runs)
            self._more.set_text(f"and {hidden:,} older runs: `traceml runs` lists them" if hidden else "")
            for gone in self._rows.keys() - {run.id for run in runs}:
                self._rows.pop(gone).row.delete()

            for place, run in enumerate(runs):
                self._show_run(place, run)

    def _show_run(self, place: int, run: RunInfo) -> None:
        if run.id not in self._rows:
            with self._body:
                self._rows[run.id] = _RunRow(run)

            self._rows[run.id].row.move(target_index=place)

        self._rows[run.id].show(run)

    def _table(self) -> None:
        with Container("table"):
            TextNode("caption", "runs, the newest first", "visually-hidden")
            with Container("thead"), Container("tr"):
                for heading, classes in _COLUMNS:
                    TextNode("th", heading, classes, scope="col")

            self._body = Container("tbody")
            with self._body, Container("tr", id="none-found", style="display:none"):
                TextNode("td", "No run matches the search.", "note", colspan=len(_COLUMNS))


_COLUMNS = (
    ("", "pickcell"),
    ("Run", ""),
    ("State", ""),
    ("Verdict", ""),
    ("Ranks", "n wide-only"),
    ("Samples/s", "n wide-only"),
    ("Started", "wide-only"),
    ("Took", "n wide-only"),
    ("Size", "n wide-only"),
)


class _RunRow:
    """One run of the list."""

    def __init__(self, run: RunInfo) -> None:
        with Container("tr") as self.row:
            with Container("td", "pickcell"):
                Container("input", "", type="checkbox", data_run=run.id, aria_label=f"pick {run.name} to compare")

            with Container("td"):
                self._name = link(run.name, run_path(run.id), "name")
                TextNode("span", run.id, "id mono")

            with Container("td"):
                self._state = TextNode("span", "", "pill")

            with Container("td", "verdictcell"):
                self._verdict = TextNode("span", "", "pill")

            self._cells = [TextNode("td", "", classes) for _, classes in _COLUMNS[4:]]

    def show(self, run: RunInfo) -> None:
        """Show the current state of the run."""
        self._name.set_text(run.name)
        self._state.set_text(run.state)
        self._state.set_classes(f"pill {run.state}")
        self._verdict.set_text(_verdict_text(run.verdict))
        self._verdict.set_classes(f"pill {run.severity or ''}")
        set_visible(self._verdict, run.verdict is not None)
        took = run.duration_s
        if took is None and run.started is not None and run.state == "running":
            took = time.time() - run.started

        rate = rate_text(run.samples_per_second)
        texts = str(run.world_size), rate, _when(run.started), duration_text(took), bytes_text(run.size_bytes)
        for cell, text in zip(self._cells, texts, strict=True):
            cell.set_text(text)

        words = f"{run.name} {run.id} {run.state} {run.verdict or ''} {_verdict_text(run.verdict)}".lower()
        if self.row.props.get("data-words") != words:
            self.row.props["data-words"] = words


def _verdict_text(verdict: str | None) -> str:
    return (verdict or "").replace("_", " ").capitalize()


def _when(epoch_s: float | None) -> str:
    return "-" if epoch_s is None else time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(epoch_s))
