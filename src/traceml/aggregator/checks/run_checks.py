"""All checks of open runs that the aggregator makes once a second, and their state by run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.finding_alerts import FindingAlerts
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.aggregator.checks.competing_processes import CompetingProcesses
from traceml.aggregator.checks.hang_termination import HungJobs
from traceml.aggregator.checks.job_notices import JobNotices
from traceml.aggregator.checks.run_times import RunTimes
from traceml.aggregator.collecting.source_readings import SourceReadings
from traceml.aggregator.live_verdict import LiveVerdict
from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks
from traceml.fail_open import fail_open

__all__ = ["RunChecks", "checking"]

_LAST_ALERTS_S = 5.0

_log = logging.getLogger("traceml")


def checking(run: ActiveRun) -> fail_open:
    """Return the guard of a check of a run: an error is logged, and the other runs are checked."""
    return fail_open(_log, "aggregator", f"run {run.id} could not be checked", level=logging.ERROR)


class _OpenRun:
    """Readings of an open run beside its rows, and its verdict."""

    def __init__(
        self,
        run: ActiveRun,
        start: Callable[[Coroutine[Any, Any, None]], None],
        on_mute: Callable[[dict[str, Any]], object] | None,
    ) -> None:
        self.silent, self.competing = SilentRanks(run, start), CompetingProcesses(run, start)
        self.times, self.verdict = RunTimes(run, start), LiveVerdict(run.live)
        self.notices = JobNotices(run, self.silent, on_mute=on_mute)


class RunChecks:
    """Checks the runs of one aggregator."""

    def __init__(
        self,
        start: Callable[[Coroutine[Any, Any, None]], None],
        report: Callable[[Path], object] | None,
        nice: int,
        alerts: FindingAlerts | None,
        profiles: FindingProfiles,
        on_mute: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._start, self._on_mute = start, on_mute
        self.alerts = alerts if alerts is not None else FindingAlerts((), 0.0)
        self._profiles = profiles
        self.sources = SourceReadings(nice)
        self._hung = HungJobs(report)
        self._open: dict[ActiveRun, _OpenRun] = {}

    def check(self, run: ActiveRun) -> LiveVerdict:
        """Check an open run, and return its verdict. Call it once a second."""
        run.commit()  # the verdict is of all that has come
        for stream in run.connected:
            stream.refresh_cgroup()

        opened = self._open[run] = self._open.get(run) or _OpenRun(run, self._start, self._on_mute)
        for readings in (opened.silent, opened.competing, opened.times):
            readings.check()

        verdict = opened.verdict
        verdict.update(run.store)
        opened.notices.check(verdict.findings)
        self.alerts.check(run, verdict.findings)
        self._profiles.check(run, verdict.findings)
        self.sources.check(run)
        run.commit()
        if verdict.is_hang and self._hung.is_due(run):
            self._start(self._abort(run))

        return verdict

    def verdict_count(self, run: ActiveRun) -> int:
        """Return how many verdicts of a run were stored."""
        return self._open[run].verdict.count if run in self._open else 0

    def end(self, run: ActiveRun) -> None:
        """Send the last alerts of a run that is over, and forget it."""
        self.alerts.check_end(run, run.final_findings)
        self.alerts.forget(run)
        self._profiles.forget(run)
        self._open.pop(run, None)
        self._hung.forget(run)

    async def close(self) -> None:
        """Wait for alerts that are being sent, and end the profiles."""
        await self.alerts.close(_LAST_ALERTS_S)
        await self._profiles.close()

    async def _abort(self, run: ActiveRun) -> None:
        with checking(run):
            await self._hung.abort(run)
