"""End of jobs that hang, where their setting `on_hang` is `abort`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.silence.absent_ranks import AbsentRanks
from traceml.aggregator.silence.rank_stacks import snapshots_from_outside
from traceml.clock import process_start_ticks
from traceml.database.snapshots import ABORT
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import end_started_processes

__all__ = ["HungJobs"]

_KILL_AFTER_S = 10.0

_log = logging.getLogger("traceml")


class HungJobs:
    """Ends jobs that hang: each process ends itself, and on this host those are killed that cannot."""

    def __init__(self, report: Callable[[Path], object] | None) -> None:
        self._report = report
        self._ended: set[ActiveRun] = set()

    def is_due(self, run: ActiveRun) -> bool:
        """Return whether a run that hangs is to be ended; true once for each run."""
        if run in self._ended or not run.live.intake.facts.progress.aborts:
            return False

        self._ended.add(run)
        return True

    async def abort(self, run: ActiveRun) -> None:
        """Write the report of a run, then end its processes by SIGTERM, and by SIGKILL those that stay."""
        _log.warning("run %s hangs and is ended, as on_hang is abort", run.id)
        await self._snapshot_silent(run)
        run.commit(force=True)
        with fail_open(_log, "aggregator", f"no report of the hung run {run.id}", level=logging.ERROR):
            if self._report is not None:
                await asyncio.to_thread(self._report, run.path)

        run.store.event(ABORT, {"why": "hang", "attempt": run.attempt})
        run.live.intake.facts.progress.was_aborted = True
        run.commit(force=True)
        for stream in run.connected:
            if stream.peer is not None:
                stream.peer.send({"t": "command", "id": 0, "name": "abort", "args": {}})

        await asyncio.sleep(_KILL_AFTER_S)
        for stream in run.streams:
            pid = None if stream.ended else stream.pid_here
            if pid is not None and process_start_ticks(pid) == stream.incarnation.start_ticks:
                _kill(pid)

        for process in AbsentRanks(run).find():
            _kill(process.pid)

    @staticmethod
    async def _snapshot_silent(run: ActiveRun) -> None:
        """Take a last snapshot of ranks that cannot answer: the one before may be some seconds old."""
        ranks = [stream for stream in run.connected if stream.is_diagnosed and not stream.is_helper]
        await snapshots_from_outside(run, ranks, is_last=True)

    def forget(self, run: ActiveRun) -> None:
        """Forget a run that is over."""
        self._ended.discard(run)


def _kill(pid: int) -> None:
    """Kill a rank; programs that it has started are asked to end."""
    end_started_processes(pid)
    os.kill(pid, signal.SIGKILL)
