"""Search for other processes on the host of rank 0 while a run waits for cores."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from traceml.aggregator.active_run import ActiveRun
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.inspection.busy_processes import BusyProcesses, CoreUse

__all__ = ["CompetingProcesses"]

_COMPETING_S = 3.0
_PAUSE = 500
"""Pause after a reading, as a multiple of its own CPU time: readings take at most a 500th of a core."""


class CompetingProcesses:
    """Looks for other processes while the ranks of a run on the host of rank 0 wait for cores.

    A reading is of the time since the one before, so each needs another step: processes of the script that it starts
    late or ends early are not of the training.
    """

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run, self._start = run, start
        self._busy = BusyProcesses()
        self._due_s = 0.0
        self._step = 0
        self._is_reading = False

    def check(self) -> None:
        """Read again if it is time, and if a rank waits."""
        if self._is_reading or time.monotonic() < self._due_s:
            return

        step, last = self._run.live.facts_builder.waits_for_core_in_step, self._step
        if step <= 0 or step == last:  # a restarted rank counts from 0 again
            return

        ranks = [each for each in self._run.connected if each.seen_here]
        if any(each.rank == 0 for each in ranks):
            self._step, self._is_reading = step, True
            self._start(self._read({each.incarnation.pid for each in ranks}))

    async def _read(self, ranks: set[int]) -> None:
        found, cost_s = await asyncio.to_thread(self._measured, ranks)
        self._due_s = time.monotonic() + max(_COMPETING_S, _PAUSE * cost_s)
        self._is_reading = False
        if found is not None and not self._run.ended:
            row = {"cores": found.others, "started": found.started}
            self._run.store.event(COMPETING_PROCESSES, row)
            self._run.live.facts_builder.competing_processes.add(row)

    def _measured(self, ranks: set[int]) -> tuple[CoreUse | None, float]:
        began_s = time.thread_time()
        return self._busy.read(ranks, {os.getpid()}), time.thread_time() - began_s
