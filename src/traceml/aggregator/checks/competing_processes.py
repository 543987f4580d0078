"""Names of the processes that take the cores of a training on this host, read outside the training."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.inspection.busy_processes import BusyProcesses

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun

__all__ = ["CompetingProcesses"]

_EVERY_S = 3.0
_PAUSE = 500
"""Pause after a reading, as a multiple of its own CPU time: readings take at most a 500th of a core."""


class CompetingProcesses:
    """Looks for other processes while the ranks of a run on the host of rank 0 wait for cores."""

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run, self._start = run, start
        self._busy = BusyProcesses()
        self._due_s = 0.0
        self._is_reading = False

    def check(self) -> None:
        """Read again if it is time, and if a rank waits."""
        if self._is_reading or time.monotonic() < self._due_s or not self._run.live.intake.facts.has_core_waits:
            return

        ranks = [each for each in self._run.connected if each.seen_here]
        if any(each.rank == 0 for each in ranks):
            self._is_reading = True
            self._start(self._read({os.getpid(), *(each.incarnation.pid for each in ranks)}))

    async def _read(self, own: set[int]) -> None:
        found, cost_s = await asyncio.to_thread(self._measured, own)
        self._due_s = time.monotonic() + max(_EVERY_S, _PAUSE * cost_s)
        self._is_reading = False
        if found and not self._run.ended:
            self._run.store.event(COMPETING_PROCESSES, {"cores": found})
            self._run.live.intake.facts.competing_processes.add(found)

    def _measured(self, own: set[int]) -> tuple[dict[str, float], float]:
        began_s = time.thread_time()
        return self._busy.read(own), time.thread_time() - began_s
