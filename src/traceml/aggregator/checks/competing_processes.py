"""Search for other processes on the host of rank 0 while a run waits for cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.checks.paced_readings import PacedReadings
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.inspection.busy_processes import BusyProcesses, CoreUse

__all__ = ["CompetingProcesses"]

_INTERVAL_S = 3.0


class CompetingProcesses:
    """Looks for other processes while the ranks of a run on the host of rank 0 wait for cores.

    A reading is of the time since the one before, so each needs another step: processes of the script that it starts
    late or ends early are not of the training.
    """

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run = run
        self._busy = BusyProcesses()
        self._readings = PacedReadings(start, "other processes that use the cores are not known")
        self._step = 0

    def check(self) -> None:
        """Read again if it is time, and if a rank waits."""
        if not self._readings.is_due:
            return

        step, last = self._run.live.facts_builder.waits_for_core_in_step, self._step
        if step <= 0 or step == last:  # a restarted rank counts from 0 again
            return

        ranks = [each for each in self._run.connected if each.seen_here]
        if any(each.rank == 0 for each in ranks):
            self._step = step
            pids = {each.incarnation.pid for each in ranks}
            self._readings.begin(lambda: self._busy.read(pids, {os.getpid()}), self._take, _INTERVAL_S)

    def _take(self, found: CoreUse | None) -> None:
        if found is not None and not self._run.ended:
            row = {"cores": found.others, "started": found.started}
            self._run.store.event(COMPETING_PROCESSES, row)
            self._run.live.facts_builder.competing_processes.add(row)
