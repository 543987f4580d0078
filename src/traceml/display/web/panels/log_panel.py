"""Events of a run, and the lines of its log files, with search by words and level."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from nicegui import Client, background_tasks, run

from traceml.database.store.reader import RunEvent
from traceml.diagnosis.deaths.end_wording import end_summary
from traceml.display.web.elements import EMIT_VALUE, Container, DataTable, TextNode, link, set_visible
from traceml.display.web.run_files import file_path
from traceml.display.web.run_sources import RunState
from traceml.formatting import json_text
from traceml.runs.log_tails import LEVELS, LogTail, search_logs
from traceml.runs.report.report_types import RankSection

__all__ = ["LogPanel"]

_LEVEL_WORDS = {"all": "All lines", "warning": "Warnings and errors", "error": "Errors"}


class LogPanel:
    """Events, and the ends of the files in the run's `logs`, or the lines that are searched for."""

    def __init__(self, client: Client, run_dir: Path) -> None:
        self._client, self._run_dir = client, run_dir
        self._words, self._level = "", "all"
        self._state: RunState | None = None
        self._tails: dict[str, tuple[Container, TextNode]] = {}
        self._search_box()
        with Container("div", "card") as self._card, Container("details", "", open=True):
            TextNode("summary", "Events")
            with Container("div", "events", tabindex="0", role="region", aria_label="events"):
                self._events = DataTable(
                    (("Time", "nowrap"), ("What", "nowrap"), ("Details", "long")), "events, the newest first"
                )
                self._no_events = TextNode("p", "No events.", "note")

        with self._card:
            self._none = TextNode("p", "No line contains this.", "note")

        set_visible(self._none, False)

    def show(self, state: RunState) -> None:
        """Show the current logs."""
        self._state = state
        rows = [_event_cells(event) for event in reversed(state.events)]
        set_visible(self._no_events, not rows)
        words = self._words.lower().split()
        self._events.show([row for row in rows if all(word in " ".join(row).lower() for word in words)])
        if self._searching:
            background_tasks.create(self._find(), name="search of logs")
        else:
            self._show_tails(state.logs)

    @property
    def _searching(self) -> bool:
        return bool(self._words.strip()) or self._level != "all"

    def _search_box(self) -> None:
        with Container("div", "toolbar"):
            attributes = {"type": "search", "placeholder": "Search logs and events", "aria_label": "search logs"}
            box = Container("input", "search", id="log-search", autocomplete="off", **attributes)
            box.on("input", lambda event: self._ask(words=event.args), js_handler=EMIT_VALUE, throttle=0.2)
            with Container("select", "tool", id="log-level", aria_label="least level of lines") as level:
                for name, text in _LEVEL_WORDS.items():
                    TextNode("option", text, value=name)

            level.on("change", lambda event: self._ask(level=event.args), js_handler=EMIT_VALUE)

    def _ask(self, words: object = None, level: object = None) -> None:
        self._words = str(words) if words is not None else self._words
        self._level = str(level) if level in LEVELS else self._level
        if self._state is not None:
            self.show(self._state)

    async def _find(self) -> None:
        asked = self._words, self._level
        found = await run.io_bound(search_logs, self._run_dir, *asked)
        if asked == (self._words, self._level):
            with self._client:
                self._show_tails(found)

    def _show_tails(self, tails: Sequence[LogTail]) -> None:
        searching = self._searching
        shown = [tail for tail in tails if tail.text or not searching]
        set_visible(self._none, searching and not shown and bool(tails))
        for tail in shown:
            self._show_tail(tail, searching=searching)

        for name in self._tails.keys() - {tail.name for tail in shown}:
            set_visible(self._tails[name][0], False)

    def _show_tail(self, tail: LogTail, *, searching: bool) -> None:
        if tail.name not in self._tails:
            with self._card, Container("details") as block:
                TextNode("summary", tail.name)
                with Container("p", "note"):
                    link("Download", file_path(self._run_dir.name, f"logs/{tail.name}"))

                self._tails[tail.name] = block, TextNode("pre", "", "log", tabindex="0")

        block, text = self._tails[tail.name]
        set_visible(block, True)
        if searching and not block.props.get("open"):
            block.props["open"] = True

        before = "[earlier lines are in the file]\n" if tail.cut else ""
        text.set_text(before + (tail.text or "(empty)"))


def _event_cells(event: RunEvent) -> list[str]:
    at = time.strftime("%H:%M:%S", time.localtime(event.epoch_ns / 1e9))
    if event.kind == "verdict":
        first = (event.data.get("findings") or [{}])[0]
        return [at, "verdict", f"{first.get('kind', '')}: {first.get('summary', '')}"]

    if event.kind == "rank":
        return [at, "rank", f"rank {event.data.get('rank')}: {_rank_state(event.data)}"]

    return [at, event.kind, ", ".join(f"{name} {json_text(value)}" for name, value in event.data.items() if value)]


def _rank_state(data: Mapping[str, Any]) -> str:
    try:
        rank = msgspec.convert(data, RankSection)
    except msgspec.ValidationError:
        return str(data.get("state", ""))

    return end_summary(rank.ended) or rank.state
