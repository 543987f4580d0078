"""Snapshots of traced workers of this host whose recorder does not run; an aggregator sees its own host only.

Process: the agent of a launch, and `traceml run` on a node whose run is on another one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from traceml.database.flight.flight_archive import find_live_flight
from traceml.database.flight.postmortem import flight_identity
from traceml.database.snapshots.external_snapshots import FIRST_SILENT_S, ExternalSnapshots, silent_s

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SilentWorker", "SilentWorkers"]

_EVERY_S = 1.0
_JOB_FACTS = ("attempt", "world_size", "hang_timeout_s", "on_hang")


class SilentWorker(NamedTuple):
    """A snapshot of a silent worker.

    Attributes:
        snapshot: in the form of its row.
        job: what its flight file says of its job, for an aggregator to which it has not connected.
    """

    rank: int
    pid: int
    snapshot: dict[str, Any]
    job: dict[str, Any]


class _WatchedWorker(NamedTuple):
    """A worker with a flight file."""

    snapshots: ExternalSnapshots
    job: dict[str, Any]


class SilentWorkers:
    """The silent workers of one job.

    Args:
        run_id: the run that the job is traced as.
        runs_dir: folder for the files of ranks that have no folder in memory.
        send: takes each snapshot.
    """

    def __init__(self, run_id: str, runs_dir: str, send: Callable[[SilentWorker], object]) -> None:
        self._run_id, self._runs_dir, self._send = run_id, runs_dir, send
        self._watched: dict[int, _WatchedWorker] = {}
        self._silent_s: dict[int, float] = {}
        self._checked_s = 0.0

    def check(self, pids: Iterable[int]) -> None:
        """Take snapshots of silent workers, once a second; one of them is asked for its stack, which takes up to 1 s.

        Args:
            pids: processes that run. One without a flight file of the job is left alone.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s < _EVERY_S:
            return

        self._checked_s = now_s
        workers = {pid: watched for pid in pids if (watched := self._watch(pid)) is not None}
        # The caller does nothing else meanwhile: one worker is asked in each check, in turns.
        for pid in sorted(workers, key=lambda pid: workers[pid].snapshots.asked_s):
            may_ask = all(each.snapshots.asked_s < now_s for each in workers.values())
            self._check(workers[pid], pid, may_ask=may_ask)

    def _check(self, watched: _WatchedWorker, pid: int, *, may_ask: bool) -> None:
        snapshots = watched.snapshots
        slots = snapshots.slots()
        if slots is None or slots.is_ending:
            return

        quiet_s = silent_s(slots)
        if quiet_s >= FIRST_SILENT_S:
            self._silent_s[pid] = quiet_s
            snapshot = snapshots.make(may_ask=may_ask)
            if snapshot is not None and snapshots.is_news(snapshot):
                self._send(SilentWorker(snapshots.rank, pid, snapshot.to_row(), watched.job))
        elif pid in self._silent_s:
            snapshot = snapshots.end(self._silent_s.pop(pid))
            del self._watched[pid]
            if snapshot is not None:
                self._send(SilentWorker(snapshots.rank, pid, snapshot.to_row(), watched.job))

    def _watch(self, pid: int) -> _WatchedWorker | None:
        """Return what is known of a worker; None before it has a flight file."""
        if pid not in self._watched:
            path = find_live_flight(pid, self._run_id, runs_dir=self._runs_dir)
            if path is None:
                return None

            identity = flight_identity(path)
            job = {name: identity[name] for name in _JOB_FACTS if name in identity}
            self._watched[pid] = _WatchedWorker(ExternalSnapshots(identity.get("rank", 0), pid, path), job)

        return self._watched[pid]
