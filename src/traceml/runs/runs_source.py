"""Data source of lists of runs: the runs in a folder, read again where their files have changed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from traceml.database.states import RunStatus
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.find import RunInfo, describe_run, run_folders
from traceml.runs.run_labels import labels_time
from traceml.runs.run_query import RunFields

__all__ = ["RunFileTimes", "RunsSource", "RunsState"]


@dataclass(frozen=True, slots=True)
class RunsState:
    """The list of runs, newest first, archived ones included, or the problem that prevents it."""

    runs: tuple[RunInfo, ...] = ()
    problem: str = ""
    fields: tuple[RunFields, ...] = field(default=(), compare=False)  # the same runs, with their parameters and metrics


class RunsSource:
    """Follows the folder of runs; a run that has ended is read again when its files or labels change."""

    def __init__(self, runs_dir: Path) -> None:
        self._path = runs_dir
        self._known: dict[Path, tuple[float, RunFields]] = {}
        self._state: RunsState | None = None

    def __repr__(self) -> str:
        return f"RunsSource({str(self._path)!r})"

    def read(self) -> RunsState | None:
        """Return the list; None when nothing has changed."""
        try:
            listed = self._list()
            state = RunsState(tuple(each.info for each in listed), fields=tuple(listed))
        except OSError as error:
            state = RunsState(problem=f"cannot list {self._path}: {error.strerror or error}")

        if state == self._state:
            return None

        self._state = state
        return state

    def close(self) -> None:
        """Keep what was read of runs that have ended, for later visits; the next read returns the list again."""
        self._state = None

    def _list(self) -> list[RunFields]:
        known = {path: self._describe(path) for path in run_folders(self._path)}
        self._known = known
        fields = [each for _, each in known.values()]
        return sorted(fields, key=lambda each: (each.info.started or 0.0, each.info.id), reverse=True)

    def _describe(self, path: Path) -> tuple[float, RunFields]:
        written = RunFileTimes(path).newest() + labels_time(path)
        before = self._known.get(path)
        if before is not None and before[0] == written and before[1].info.state != RunStatus.RUNNING:
            return before

        return written, RunFields(describe_run(path))


class RunFileTimes:
    """Time of the last write to a run's files."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files = [run_dir / STORE_NAME, run_dir / f"{STORE_NAME}-wal", run_dir / REPORT_NAME]
        self._seen = -1.0

    def newest(self) -> float:
        """Return the epoch seconds of the last write, 0 without any file."""
        found = []
        for file in self._files:
            try:
                found.append(file.stat().st_mtime)
            except OSError:
                pass  # it does not exist, or is being removed

        return max(found, default=0.0)

    def age_s(self) -> float:
        """Return the seconds since the last write."""
        return max(0.0, time.time() - self.newest())

    def take_change(self) -> bool:
        """Return whether something was written since the last call, labels of people included."""
        newest = self.newest() + labels_time(self._run_dir)
        changed, self._seen = newest != self._seen, newest
        return changed
