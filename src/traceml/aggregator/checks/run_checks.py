"""All checks of open runs that the aggregator makes once a second, and their state by run."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.finding_alerts import FindingAlerts
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.aggregator.checks.hang_termination import HungJobs
from traceml.aggregator.checks.run_times import RunTimes
from traceml.aggregator.collecting.source_readings import SourceReadings
from traceml.aggregator.live_verdict import LiveVerdict
from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.fail_open import fail_open
from traceml.inspection.busy_processes import BusyProcesses, CoreUse

__all__ = ["RunChecks", "checking"]

_LAST_ALERTS_S = 5.0
_COMPETING_S = 3.0
_PAUSE = 500
"""Pause after a reading, as a multiple of its own CPU time: readings take at most a 500th of a core."""

_log = logging.getLogger("traceml")


def checking(run: ActiveRun) -> fail_open:
    """Return the guard of a check of a run: an error is logged, and the other runs are checked."""
    return fail_open(_log, "aggregator", f"run {run.id} could not be checked", level=logging.ERROR)


class RunChecks:
    """Checks the runs of one aggregator."""

    def __init__(
        self,
        start: Callable[[Coroutine[Any, Any, None]], None],
        report: Callable[[Path], object] | None,
        nice: int,
        alerts: FindingAlerts | None,
        profiles: FindingProfiles,
    ) -> None:
        self._start = start
        self.alerts = alerts if alerts is not None else FindingAlerts((), 0.0)
        self._profiles = profiles
        self.sources = SourceReadings(nice)
        self._hung = HungJobs(report)
        self._verdicts: dict[ActiveRun, LiveVerdict] = {}
        self._silent: dict[ActiveRun, SilentRanks] = {}
        self._competing: dict[ActiveRun, CompetingProcesses] = {}
        self._times: dict[ActiveRun, RunTimes] = {}

    def check(self, run: ActiveRun) -> LiveVerdict:
        """Check an open run, and return its verdict. Call it once a second."""
        run.commit()  # the verdict is of all that has come
        for stream in run.connected:
            stream.follow_groups()

        self._silent.setdefault(run, SilentRanks(run, self._start)).check()
        self._competing.setdefault(run, CompetingProcesses(run, self._start)).check()
        self._times.setdefault(run, RunTimes(run, self._start)).check()
        verdict = self._verdicts.setdefault(run, LiveVerdict(run.live))
        verdict.update(run.store)
        self.alerts.check(run, verdict.findings)
        self._profiles.check(run, verdict.findings)
        self.sources.check(run)
        run.commit()
        if verdict.is_hang and self._hung.is_due(run):
            self._start(self._abort(run))

        return verdict

    def verdict_count(self, run: ActiveRun) -> int:
        """Return how many verdicts of a run were stored."""
        return self._verdicts[run].count if run in self._verdicts else 0

    def end(self, run: ActiveRun) -> None:
        """Send the last alerts of a run that is over, and forget it."""
        self.alerts.check_end(run, run.final_findings)
        self.alerts.forget(run)
        self._profiles.forget(run)
        self._verdicts.pop(run, None)
        self._silent.pop(run, None)
        self._competing.pop(run, None)
        self._times.pop(run, None)
        self._hung.forget(run)

    async def close(self) -> None:
        """Wait for alerts that are being sent, and end the profiles."""
        await self.alerts.close(_LAST_ALERTS_S)
        await self._profiles.close()

    async def _abort(self, run: ActiveRun) -> None:
        with checking(run):
            await self._hung.abort(run)


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
