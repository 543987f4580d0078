"""Reports of the runs that are running, read when a monitoring system asks."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.renderers.monitoring_metrics import Instruments
from traceml.renderers.monitoring_readings import Reading, readings
from traceml.run_folder import STORE_NAME
from traceml.runs.find import RunInfo
from traceml.runs.live_run import LiveRun
from traceml.runs.report.report_types import Report
from traceml.runs.run_state import UNREADABLE_STATES, is_written_by
from traceml.runs.runs_source import RunsSource

__all__ = ["MAX_RUNS", "ActiveRuns", "RunsSnapshot", "is_store_of"]

MAX_RUNS = 32
"""Running runs that are shown; the oldest of more are counted only."""

# Each has a value, 0 at first: Prometheus sees an increase only in a series that it knows.
_STATES = (*(state.value for state in RunStatus), *UNREADABLE_STATES)
_FRESH_S = 1.0  # who asks more often, as two servers together, gets the same answer

_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class RunsSnapshot:
    """The runs of a folder at one time."""

    reports: Sequence[Report] = ()  # of the running runs, the newest first
    states: tuple[tuple[str, int], ...] = ()  # number of all runs by state
    hidden: int = 0  # running runs without a report because there are too many
    infos: tuple[RunInfo, ...] = ()

    def readings(self) -> list[Reading]:
        """Return the values of every metric."""
        found = [Reading(Instruments.RUNS, (state,), count) for state, count in self.states]
        found.append(Reading(Instruments.RUNS_HIDDEN, (), self.hidden))
        return found + [each for report in self.reports for each in readings(report)]


class ActiveRuns:
    """Follows the running runs of a folder; may be asked from several threads.

    Args:
        owner: process id of an aggregator: only its runs have reports.
    """

    def __init__(
        self, runs_dir: Path, *, owner: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = RunsSource(Path(runs_dir))
        self._owner = owner
        self._clock = clock
        self._infos: tuple[RunInfo, ...] = ()
        self._live: dict[Path, LiveRun] = {}
        self._lock = threading.Lock()
        self._snapshot: RunsSnapshot | None = None
        self._read_s = 0.0

    def snapshot(self, *, fresh: bool = False) -> RunsSnapshot:
        """Return the runs as they are now; an answer of the last second is used again, unless it must be `fresh`."""
        with self._lock:
            if self._snapshot is None or fresh or self._clock() - self._read_s >= _FRESH_S:
                self._snapshot = self._read()
                self._read_s = self._clock()

            return self._snapshot

    def infos(self) -> tuple[RunInfo, ...]:
        """Return the runs of the folder, without a report of any."""
        with self._lock:
            return self._read_infos()

    def close(self) -> None:
        """Close the stores."""
        with self._lock:
            self._drop(set(self._live))

    def _read(self) -> RunsSnapshot:
        infos = self._read_infos()
        running = [info.path for info in infos if info.state == RunStatus.RUNNING and self._is_owned(info.path)]
        shown = running[:MAX_RUNS]
        self._drop(set(self._live) - set(shown))
        reports = [report for path in shown if (report := self._report(path)) is not None]
        states = Counter(dict.fromkeys(_STATES, 0))
        states.update(info.state for info in infos)
        return RunsSnapshot(reports, tuple(states.items()), len(running) - len(shown), infos)

    def _read_infos(self) -> tuple[RunInfo, ...]:
        state = self._source.read()
        self._infos = self._infos if state is None else state.runs
        return self._infos

    def _is_owned(self, path: Path) -> bool:
        try:
            return self._owner is None or is_store_of(path, self._owner)
        except StoreError:  # it was removed, or is being replaced
            return False

    def _report(self, path: Path) -> Report | None:
        if path not in self._live:
            self._live[path] = LiveRun(path)

        live = self._live[path]
        try:
            live.refresh()
            return live.report()
        except StoreError as error:  # the store was replaced: the next request opens the new one
            _log.warning("the metrics of %s are missing: %s", path.name, error)
            self._drop({path})
            return None

    def _drop(self, paths: set[Path]) -> None:
        for path in paths:
            self._live.pop(path).close()


def is_store_of(run_dir: Path, owner: int) -> bool:
    """Return whether an aggregator of this host writes the store of a run.

    Raises:
        StoreError: it cannot be read.
    """
    with StoreReader(run_dir / STORE_NAME) as reader:
        return is_written_by(reader.meta().get("aggregator", {}), owner)
