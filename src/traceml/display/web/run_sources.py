"""Data source of the page of a run, read from its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.database.states import RunStatus
from traceml.database.store.reader import RunEvent
from traceml.display.web.chart_cache import ChartCache
from traceml.errors import StoreError
from traceml.renderers.views import RunView, run_view
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.about import About
from traceml.runs.live_run import LiveRun
from traceml.runs.log_tails import LogTail, log_tails
from traceml.runs.report.comparison_facts import about_report
from traceml.runs.report.report import written_report
from traceml.runs.report.report_types import read_report
from traceml.runs.rows.logged_media import MediaGroup
from traceml.runs.run_labels import RunLabels, read_labels
from traceml.runs.runs_source import RunFileTimes

if TYPE_CHECKING:
    from traceml.runs.rows.series import RunSeries

__all__ = ["RunSource", "RunState", "is_run_id"]

# A running run writes its samples at least once a second; a longer silence is reported.
_SILENT_S = 5.0


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run on its page."""

    id: str
    problem: str = ""  # why it cannot be read; empty if it can
    exists: bool = True
    view: RunView | None = None  # the report so far; None before there is one
    events: tuple[RunEvent, ...] = ()  # events of the run, oldest first
    logs: tuple[LogTail, ...] = ()  # ends of the files in its `logs`
    silent_s: float | None = None  # seconds since a running run wrote data, from 5 on; None before
    watched: bool = True  # whether the aggregator that writes it is alive, as far as is known
    charts: ChartCache | None = None
    about: About = field(default_factory=About)  # parameters, source, environment, machine
    labels: RunLabels = field(default_factory=RunLabels)
    logged: tuple[MediaGroup, ...] = ()  # texts, images, histograms and files that it logged


def is_run_id(name: str) -> bool:
    """Return whether a name from an address can be a run's folder, and not a path out of the folder of runs."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name and "\0" not in name


class RunSource:
    """Follows a run in its folder, also one that appears later; a damaged one is tried again.

    Args:
        themes: the themes in use; their charts are made here, off the event loop.
    """

    def __init__(
        self, run_dir: Path, themes: Collection[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._path = run_dir
        self._themes = themes
        self._live: LiveRun | None = None
        self._state = RunState(run_dir.name)
        self._changed_s = self._clock()
        self._written = RunFileTimes(run_dir)
        self._complete = False
        self._published = False
        self._inode = -1

    def __repr__(self) -> str:
        return f"RunSource({str(self._path)!r})"

    def read(self) -> RunState | None:
        """Return the state of the run; None when nothing has changed."""
        before = self._state
        try:
            self._state = self._read_state()
        except (StoreError, OSError) as error:
            self.close()
            self._state = self._with_problem(str(error))

        published, self._published = self._published, True
        return None if published and self._state is before else self._state

    def close(self) -> None:
        """Close the store; a later read opens it again."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _read_state(self) -> RunState:
        if not (self._path / STORE_NAME).is_file():
            return self._without_store()

        inode = (self._path / STORE_NAME).stat().st_ino
        if inode != self._inode:
            self.close()  # another file has taken its place

        fresh = self._live is None
        if self._live is None:
            self._inode = inode
            self._live = LiveRun(self._path)
            self._changed_s = self._clock() - self._written.age_s()
            self._complete = False

        changed = self._live.refresh()
        if changed:
            self._changed_s = self._clock()

        if changed or fresh or self._state.problem or not self._complete or self._written.take_change():
            self._complete = self._live.ended
            return self._full_state(self._live)

        return self._with_silence(self._live)

    def _without_store(self) -> RunState:
        self.close()
        if not self._path.is_dir():
            gone = self._state.view is not None
            problem = "The folder of this run was removed while it was shown." if gone else ""
            return self._with(exists=gone, problem=problem)

        if self._inode >= 0:
            return self._with(problem="The store of this run was removed while it was shown.")

        return self._reported("The store of this run is gone") or self._with(exists=True, problem="")

    def _with_problem(self, problem: str) -> RunState:
        """Return the state of a run whose store cannot be read: what is shown stays, else its report is shown."""
        if self._state.problem.startswith(problem.rstrip(".")):
            return self._state

        shown = self._reported(problem.rstrip(".")) if self._state.view is None else None
        return shown or self._with(problem=problem)

    def _reported(self, problem: str) -> RunState | None:
        """Return the state by the run's report alone; None if it has none that can be read."""
        try:
            report = read_report(self._path / REPORT_NAME)
        except (OSError, StoreError):  # not written yet, or damaged
            return None

        view = run_view(report)
        if view == self._state.view:
            return self._state

        problem = f"{problem}; this page shows its report."
        charts, labels = self._charts(view, None), read_labels(self._path)
        about = about_report(report)
        return self._with(exists=True, problem=problem, view=view, charts=charts, labels=labels, about=about)

    def _with(self, **values: Any) -> RunState:
        state = replace(self._state, **values)
        return self._state if state == self._state else state

    def _full_state(self, live: LiveRun) -> RunState:
        report = written_report(self._path) if live.ended else live.report()
        view, series = run_view(report), live.series()
        return RunState(
            self._path.name,
            view=view,
            charts=self._charts(view, series),
            events=tuple(live.events),
            logs=tuple(log_tails(self._path)),
            silent_s=self._silent(live),
            watched=report.run.state != RunStatus.LOST,
            about=live.about(),
            labels=read_labels(self._path),
            logged=live.logged(),
        )

    def _charts(self, view: RunView, series: RunSeries | None) -> ChartCache:
        charts = ChartCache(view, series)
        for theme in tuple(self._themes):
            charts.of(theme)

        return charts

    def _with_silence(self, live: LiveRun) -> RunState:
        """Return the state with the length of the silence, the only thing that changes in a silent run."""
        silent_s = self._silent(live)
        if silent_s is None:
            return self._state

        if silent_s - (self._state.silent_s or 0.0) < 1.0:
            return self._state

        return replace(self._full_state(live), silent_s=silent_s)

    def _silent(self, live: LiveRun) -> float | None:
        silent_s = self._clock() - self._changed_s
        return silent_s if not live.ended and silent_s >= _SILENT_S else None
