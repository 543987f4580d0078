"""Wall time of a run in progress by part, computed again from time to time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.checks.paced_readings import PacedReadings
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.summaries import StepSums
from traceml.diagnosis.facts.wall_time import wall_time
from traceml.run_folder import STORE_NAME

__all__ = ["RunTimes"]

_INTERVAL_S = 2.0
_NEW_SHARE = 0.01
"""Share of the run from one reading to the next: the parts cannot change by more meanwhile."""
_PAUSE_FACTOR = 500
"""Pause after a reading, in multiples of what it took: a 500th of a core, for a thousand ranks every 15 s."""
_MAX_RANKS = 32
"""Ranks whose sums are read: the parts of the wall time are means over ranks, or those of a few that evaluate."""


class RunTimes:
    """Gives the diagnosis of a running run its wall time by part, from the sums in its store, as a report does."""

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run = run
        self._readings = PacedReadings(start, "the time of a run could not be divided", _PAUSE_FACTOR)

    def check(self) -> None:
        """Read again if it is time."""
        run = self._run
        if not run.streams or not self._readings.is_due:
            return

        ranks = self._chosen()
        streams = {stream.id for stream in run.streams if stream.rank in ranks}
        pause_s = max(_INTERVAL_S, _NEW_SHARE * (run.now_s - run.started_s))
        self._readings.begin(
            lambda: _read(run.path / STORE_NAME, streams), lambda sums: self._take(ranks, *sums), pause_s
        )

    def _take(self, ranks: set[int], records: list[StreamRecord], sums: dict[int, StepSums]) -> None:
        run = self._run
        if run.ended:
            return

        builder = run.live.facts_builder
        run.live.fresh = True
        builder.time = wall_time(records, sums, run.started_s, run.now_s, builder.for_wall_time(ranks), is_running=True)

    def _chosen(self) -> set[int]:
        """Return ranks that are spread over those whose rows are sent, the first and the last one included."""
        ranks = np.setdiff1d(np.arange(self._run.world_size), self._run.live.representatives.unsent)
        return set(ranks[np.linspace(0, len(ranks) - 1, min(_MAX_RANKS, len(ranks))).astype(int)].tolist())


def _read(store: Path, streams: Collection[int]) -> tuple[list[StreamRecord], dict[int, StepSums]]:
    """Return some streams, and the sums of their steps."""
    with StoreReader(store) as reader:
        return reader.streams(streams), reader.step_sums(streams)
