"""Tables of a run's page: ranks, logs, trackers, telemetry."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from traceml.database.store.reader import RunEvent
from traceml.display.web.elements import Container, DataTable, FactList, TextNode, set_visible
from traceml.display.web.run_sources import LogTail, RunState
from traceml.formatting import (
    bytes_text,
    capitalized,
    count_text,
    duration_text,
    library_text,
    ms_text,
    overhead_text,
    percent_text,
    phase_label,
)
from traceml.renderers.views import RankRow, RunView, visible_ranks
from traceml.renderers.words import end_of_rank
from traceml.runs.report.line_shares import PhaseLines, lines_by_phase
from traceml.runs.report.report_types import RankSection

__all__ = ["DeliveryPanel", "LinePanel", "LogPanel", "RankTable", "TelemetryPanel"]

_RANKS = 24
_LINES = 8
_LEAST_LINE = 0.01
_PHASES = 7
_SMALL_SHARE = 0.005


class RankTable:
    """One row per rank; of very many, those that ended badly, the slowest and the fastest."""

    def __init__(self) -> None:
        with Container("div", "card others"):
            self._table = DataTable(_rank_columns([]), "ranks")
            self._more = TextNode("p", "", "note")

    def show(self, view: RunView) -> None:
        """Show the current state of the ranks."""
        phases = [phase.phase for phase in view.phases if phase.share >= _SMALL_SHARE][:_PHASES]
        self._table.columns(_rank_columns(phases))
        rows = visible_ranks(view.ranks, _RANKS)
        self._table.show([_rank_cells(row, phases) for row in rows], [_rank_look(row) for row in rows])
        missing = view.run.world_size - len(view.ranks)
        notes = []
        if hidden := len(view.ranks) - len(rows):
            notes.append(f"{count_text(hidden)} more ranks, none slower than the slowest one here.")

        if missing > 0:
            notes.append(f"{count_text(missing)} of {count_text(view.run.world_size)} ranks have never reported.")

        self._more.set_text(" ".join(notes))
        set_visible(self._more, bool(notes))


def _rank_columns(phases: list[str]) -> list[tuple[str, str]]:
    named = [(phase_label(phase), "n") for phase in phases]
    return [("Rank", "nowrap"), ("Host", ""), ("State", ""), ("Steps", "n"), ("Step", "n"), *named, ("Memory", "n")]


def _rank_cells(row: RankRow, phases: list[str]) -> list[str]:
    times = dict(row.phases)
    return [
        str(row.rank),
        row.host,
        row.end or row.state,
        count_text(row.steps),
        ms_text(row.step_ms) if times else "-",
        *(ms_text(times.get(phase)) for phase in phases),
        bytes_text(row.cuda_bytes or row.rss_bytes),
    ]


def _rank_look(row: RankRow) -> str:
    return "ended" if row.end else "slow" if row.slowest else ""


class LinePanel:
    """Lines of the user's code by phase, each with a bar as wide as its share of the phase."""

    def __init__(self) -> None:
        self._shown: list[PhaseLines] | None = None
        self._none = TextNode("p", "No lines were sampled: the run is too short, or stack_interval is 0.", "note card")
        self._grid = Container("div", "grid")

    def show(self, view: RunView) -> None:
        """Show the current lines."""
        phases = lines_by_phase(view.report)
        if phases == self._shown:
            return

        self._shown = phases
        set_visible(self._none, not phases)
        self._grid.clear()
        with self._grid:
            for phase in phases:
                _draw_lines(phase)


def _draw_lines(phase: PhaseLines) -> None:
    took = "" if phase.seconds is None else f", {duration_text(phase.seconds)}"
    with Container("div", f"card pad lines phase-{phase.phase}"):
        TextNode("h3", f"{capitalized(phase_label(phase.phase))}{took}")
        for each in phase.lines[:_LINES]:
            if each.share >= _LEAST_LINE:
                with Container("div", "line").style(f"--w:{100 * each.share:.1f}%"):
                    TextNode("b", percent_text(each.share))
                    with Container("span"):
                        TextNode("span", each.place or "libraries only")
                        TextNode("small", f"in {library_text(each.library)}" if each.library else "")


class LogPanel:
    """Events, and the ends of the files in the run's `logs`."""

    def __init__(self) -> None:
        self._tails: dict[str, tuple[Container, TextNode]] = {}
        with Container("div", "card") as self._card, Container("details", "", open=True):
            TextNode("summary", "Events")
            with Container("div", "events", tabindex="0", role="region", aria_label="events"):
                self._events = DataTable(
                    (("Time", "nowrap"), ("What", "nowrap"), ("", "long")), "events, the newest first"
                )

    def show(self, state: RunState) -> None:
        """Show the current logs."""
        shown = [event for number, event in enumerate(state.events) if _is_new(state.events, number)]
        self._events.show([_event_cells(event) for event in reversed(shown)])
        for tail in state.logs:
            self._show_tail(tail)

    def _show_tail(self, tail: LogTail) -> None:
        if tail.name not in self._tails:
            with self._card, Container("details") as block:
                TextNode("summary", tail.name)
                self._tails[tail.name] = block, TextNode("pre", "", "log", tabindex="0")

        before = "[earlier lines are in the file]\n" if tail.cut else ""
        self._tails[tail.name][1].set_text(before + (tail.text or "(empty)"))


def _is_new(events: tuple[RunEvent, ...], number: int) -> bool:
    """Return whether an event is new: the verdict is stored again each time its numbers change."""
    event = events[number]
    if event.kind != "verdict":
        return True

    before = next((each for each in reversed(events[:number]) if each.kind == "verdict"), None)
    return before is None or _verdict_key(before) != _verdict_key(event)


def _verdict_key(event: RunEvent) -> tuple[Any, ...]:
    first = (event.data.get("findings") or [{}])[0]
    return first.get("kind"), first.get("ranks"), first.get("phase")


def _event_cells(event: RunEvent) -> list[str]:
    at = time.strftime("%H:%M:%S", time.localtime(event.epoch_ns / 1e9))
    if event.kind == "verdict":
        first = (event.data.get("findings") or [{}])[0]
        return [at, "verdict", f"{first.get('kind', '')}: {first.get('summary', '')}"]

    if event.kind == "rank":
        return [at, "rank", f"rank {event.data.get('rank')}: {_rank_state(event.data)}"]

    return [at, event.kind, ", ".join(f"{name} {_plain(value)}" for name, value in event.data.items() if value)]


def _rank_state(data: Mapping[str, Any]) -> str:
    try:
        rank = msgspec.convert(data, RankSection)
    except msgspec.ValidationError:
        return str(data.get("state", ""))

    return end_of_rank(rank) or rank.state


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


class DeliveryPanel:
    """State of each tracker."""

    def __init__(self) -> None:
        with Container("div", "card"):
            columns = (
                ("Tracker", ""),
                ("State", ""),
                ("Delivered", "n"),
                ("Pending", "n"),
                ("Refused", "n"),
                ("", "long"),
            )
            self._table = DataTable(columns, "trackers")
            self._none = TextNode(
                "p", 'No tracker is configured. Set one by backend="mlflow" or TRACEML_BACKEND.', "note"
            )

    def show(self, view: RunView) -> None:
        """Show the current state of the trackers."""
        set_visible(self._none, not view.trackers)
        self._table.show(
            [
                [
                    tracker.backend,
                    tracker.state,
                    count_text(tracker.delivered),
                    count_text(tracker.pending),
                    count_text(tracker.failed),
                    tracker.error or tracker.target,
                ]
                for tracker in view.trackers
            ],
            ["ended" if tracker.needs_attention else "" for tracker in view.trackers],
        )


class TelemetryPanel:
    """Rows stored and lost, overhead, and the origin of the run."""

    def __init__(self) -> None:
        with Container("div", "card pad"):
            self._facts = FactList()

    def show(self, view: RunView) -> None:
        """Show the current figures."""
        telemetry, run = view.telemetry, view.run
        self._facts.show(
            (
                ("Rows stored", count_text(telemetry.rows_stored)),
                ("Rows lost", count_text(telemetry.rows_lost)),
                ("Overhead", overhead_text(telemetry.overhead_us_per_step, telemetry.overhead_share)),
                ("Sent", bytes_text(telemetry.bytes_sent)),
                ("Run", run.id),
                ("Command", run.command_line or "-"),
                ("Hosts", ", ".join(run.hosts) or "-"),
                ("traceml", view.report.traceml_version or "-"),
            )
        )
