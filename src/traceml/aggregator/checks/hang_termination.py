"""End of jobs that hang, where their setting `on_hang` is `abort`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.silent_ranks.silent_ranks import UnconnectedRanks, note_abort
from traceml.aggregator.silent_ranks.stacks_reply import snapshots_from_outside
from traceml.clock import process_start_ticks
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import end_started_processes

__all__ = ["HungJobs"]

_KILL_AFTER_S = 10.0

_log = logging.getLogger("traceml")


class _AbortedAttempt(NamedTuple):
    """The attempt that was ended last."""

    attempt: int
    until_s: float  # monotonic time until which the verdict may still be that of this attempt

    def may_hang_again(self, run: ActiveRun) -> bool:
        """Return whether the run has another attempt, which its verdict is about."""
        return run.attempt != self.attempt and time.monotonic() >= self.until_s


class HungJobs:
    """Ends jobs that hang: each process ends itself, and on this host those are killed that cannot."""

    def __init__(self, report: Callable[[Path], object] | None) -> None:
        self._report = report
        self._ended: dict[ActiveRun, _AbortedAttempt] = {}

    def is_due(self, run: ActiveRun) -> bool:
        """Return whether a run that hangs is to be ended; true once for each attempt."""
        ended = self._ended.get(run)
        if not run.live.facts_builder.progress.aborts or (ended is not None and not ended.may_hang_again(run)):
            return False

        after_s = _KILL_AFTER_S + run.live.facts_builder.progress.timeout_s
        self._ended[run] = _AbortedAttempt(run.attempt, time.monotonic() + after_s)
        return True

    async def abort(self, run: ActiveRun) -> None:
        """Write the report of a run, then end its processes by SIGTERM, and by SIGKILL those that stay."""
        _log.warning("run %s hangs and is ended, as on_hang is abort", run.id)
        # Of ranks that cannot answer, once more: the snapshot before may be some seconds old.
        await snapshots_from_outside(run, run.connected_ranks, is_last=True)
        run.commit(force=True)
        with fail_open(_log, "aggregator", f"no report of the hung run {run.id}", level=logging.ERROR):
            if self._report is not None:
                await asyncio.to_thread(self._report, run.path)

        if run.ended:  # meanwhile, by itself
            return

        note_abort(run)
        run.commit(force=True)
        processes = _running_here(run)
        for stream in run.connected:
            if stream.peer is not None:
                stream.peer.send({"t": "command", "id": 0, "name": "abort", "args": {}})

        processes += [(each.pid, process_start_ticks(each.pid)) for each in UnconnectedRanks(run).find()]
        await asyncio.sleep(_KILL_AFTER_S)
        for pid, start_ticks in processes:  # not those of an attempt that has begun meanwhile
            if process_start_ticks(pid) == start_ticks is not None:
                _kill(pid)

    def forget(self, run: ActiveRun) -> None:
        """Forget a run that is over."""
        self._ended.pop(run, None)


def _running_here(run: ActiveRun) -> list[tuple[int, int | None]]:
    """Return the processes to end, and when each has started: its number may be another's by then."""
    running = [(stream.pid_here, stream) for stream in run.streams if not stream.ended]
    return [(pid, stream.incarnation.start_ticks) for pid, stream in running if pid is not None]


def _kill(pid: int) -> None:
    """Kill a rank; programs that it has started are asked to end."""
    end_started_processes(pid)
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)
