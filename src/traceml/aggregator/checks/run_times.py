"""Wall time of a running run by part, divided again now and then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from traceml.aggregator.active_run import ActiveRun
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.summaries import StepSums
from traceml.diagnosis.facts.wall_time import wall_time
from traceml.fail_open import fail_open
from traceml.run_folder import STORE_NAME

__all__ = ["RunTimes"]

_INTERVAL_S, _AFTER_FAILURE_S = 2.0, 60.0
_NEW_SHARE = 0.01
"""Share of the run from one reading to the next: the parts cannot change by more meanwhile."""
_PAUSE = 200
"""Pause after a reading, as a multiple of its own CPU time: readings take at most a 200th of a core."""
_MAX_RANKS = 32
"""Ranks whose sums are read: the parts of the wall time are means over ranks, or those of a few that evaluate."""

_log = logging.getLogger("traceml")


class RunTimes:
    """Tells the diagnosis of a running run how its wall time divides, from the sums in its store, as a report does."""

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run, self._start = run, start
        self._due_s = 0.0
        self._is_reading = False

    def check(self) -> None:
        """Read again if it is time."""
        if not self._is_reading and self._run.streams and time.monotonic() >= self._due_s:
            self._is_reading = True
            self._start(self._read())

    async def _read(self) -> None:
        run, pause_s = self._run, _AFTER_FAILURE_S
        with fail_open(_log, "aggregator", "the time of a run could not be divided", once=True):
            ranks = self._chosen()
            streams = {stream.id for stream in run.streams if stream.rank in ranks}
            records, sums, cost_s = await asyncio.to_thread(_read, run.path / STORE_NAME, streams)
            builder, now_s = run.live.facts_builder, run.now_s
            pause_s = max(_INTERVAL_S, _NEW_SHARE * (now_s - run.started_s), _PAUSE * cost_s)
            if not run.ended:
                known = builder.for_wall_time(ranks)
                run.live.fresh |= builder.time is None
                builder.time = wall_time(records, sums, run.started_s, now_s, known, is_running=True)

        self._due_s = time.monotonic() + pause_s
        self._is_reading = False

    def _chosen(self) -> set[int]:
        """Return ranks that are spread over those whose rows are sent, the first and the last one included."""
        ranks = np.setdiff1d(np.arange(self._run.world_size), self._run.live.representatives.unsent)
        return set(ranks[np.linspace(0, len(ranks) - 1, min(_MAX_RANKS, len(ranks))).astype(int)].tolist())


def _read(store: Path, streams: Collection[int]) -> tuple[list[StreamRecord], dict[int, StepSums], float]:
    """Return some streams, the sums of their steps, and the CPU time that reading took, seconds."""
    began_s = time.thread_time()
    with StoreReader(store) as reader:
        return reader.streams(streams), reader.step_sums(streams), time.thread_time() - began_s
