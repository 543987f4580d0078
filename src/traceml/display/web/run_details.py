"""Tables of a run's page: ranks, logs, trackers, telemetry."""

from __future__ import annotations

from traceml.display.web.elements import Container, DataTable, FactList, TextNode, set_visible
from traceml.formatting import bytes_text, count_text, percent_text, phase_label, plural
from traceml.renderers.about_text import nothing_logged
from traceml.renderers.views import RankRow, RunView, visible_ranks
from traceml.renderers.wording import NO_LINES, phase_heading, shown_calls, shown_lines
from traceml.runs.about import About
from traceml.runs.report.line_shares import PhaseLines, all_lines

__all__ = ["DeliveryPanel", "LinePanel", "RankTable", "TelemetryPanel"]

_RANKS = 24
_PHASES = 7


class RankTable:
    """One row per rank; of very many, those that ended badly, the slowest and the fastest."""

    def __init__(self) -> None:
        with Container("div", "card others"):
            self._table = DataTable(_rank_columns([]), "ranks")
            self._more = TextNode("p", "", "note")

    def show(self, view: RunView) -> None:
        """Show the current state of the ranks."""
        phases = [phase.phase for phase in view.shown_phases[:_PHASES]]
        self._table.columns(_rank_columns(phases))
        rows = visible_ranks(view.ranks, _RANKS)
        looks = ["ended" if row.end else "slow" if row.slowest else "" for row in rows]
        self._table.show([_rank_cells(row, phases) for row in rows], looks)
        missing = view.report.run.world_size - len(view.ranks)
        notes = []
        if hidden := len(view.ranks) - len(rows):
            notes.append(f"{plural(hidden, 'more rank')}, none slower than the slowest one here.")

        if missing > 0:
            notes.append(
                f"{count_text(missing)} of {count_text(view.report.run.world_size)} ranks have never reported."
            )

        self._more.set_text(" ".join(notes))
        set_visible(self._more, bool(notes))


def _rank_columns(phases: list[str]) -> list[tuple[str, str]]:
    named = [(phase_label(phase), "n") for phase in phases]
    return [
        ("Rank", "nowrap"),
        ("Host", ""),
        ("State", "words"),
        ("Steps", "n"),
        ("Step", "n"),
        *named,
        ("Memory", "n"),
    ]


def _rank_cells(row: RankRow, phases: list[str]) -> list[str]:
    state = row.end or row.state
    return [str(row.rank), row.host, state, count_text(row.steps), *row.times(phases), row.memory]


class LinePanel:
    """Lines of the user's code by phase, each with a bar as wide as its share of the phase."""

    def __init__(self) -> None:
        self._shown: list[PhaseLines] | None = None
        self._none = TextNode("p", NO_LINES, "note card")
        self._grid = Container("div", "grid")

    def show(self, view: RunView) -> None:
        """Show the current lines."""
        phases = all_lines(view.report)
        if phases == self._shown:
            return

        self._shown = phases
        set_visible(self._none, not phases)
        self._grid.clear()
        with self._grid:
            for phase in phases:
                _draw_lines(phase)


def _draw_lines(phase: PhaseLines) -> None:
    with Container("div", f"card pad lines phase-{phase.phase}"):
        TextNode("h3", phase_heading(phase))
        for each in shown_lines(phase):
            with Container("div", "line").style(f"--w:{100 * each.share:.1f}%"):
                TextNode("b", percent_text(each.share))
                with Container("span"):
                    TextNode("span", each.place or "libraries only")
                    for share, library in shown_calls(each):
                        TextNode("small", f"{share}in {library}")


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
                ("Target or error", "long"),
            )
            self._table = DataTable(columns, "trackers")
            self._none = TextNode("p", "", "note")

    def show(self, view: RunView, about: About) -> None:
        """Show the current state of the trackers."""
        set_visible(self._none, not view.report.trackers)
        none = 'No tracker is configured. Set one by backend="mlflow" or TRACEML_BACKEND.'
        self._none.set_text(nothing_logged(about, "Deliveries", none))
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
                for tracker in view.report.trackers
            ],
            ["ended" if tracker.needs_attention else "" for tracker in view.report.trackers],
        )


class TelemetryPanel:
    """Rows stored and lost, and overhead."""

    def __init__(self) -> None:
        with Container("div", "card pad"):
            self._facts = FactList()

    def show(self, view: RunView) -> None:
        """Show the current figures."""
        telemetry, run = view.report.telemetry, view.report.run
        self._facts.show(
            (
                ("Rows stored", count_text(telemetry.rows_stored)),
                ("Rows lost", count_text(telemetry.rows_lost)),
                ("Overhead", view.overhead),
                ("Sent", bytes_text(telemetry.bytes_sent)),
                ("Run", run.id),
                ("traceml", view.report.traceml_version or "-"),
            )
        )
