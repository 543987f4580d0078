"""Watch over the ranks of this host whose recorder does not run: a snapshot of each once a second.

A snapshot is stored as an event of the run. Agents of a launch take those of the ranks of other hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from traceml.clock import boot_id
from traceml.database.flight.flight_folders import default_folder, disk_folders
from traceml.database.flight.flight_owner import find_unclaimed, is_alive, pid_here
from traceml.database.flight.postmortem import flight_identity, may_be_of
from traceml.database.snapshots.external_snapshots import FIRST_SILENT_S, ExternalSnapshots, silent_s
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT
from traceml.transport.hello import WORLD_LIMIT

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import RankStream
    from traceml.database.snapshots.rank_snapshot import RankSnapshot

__all__ = ["RankProcess", "SilentRanks", "UnconnectedRanks", "note_abort", "store_snapshot"]


class RankProcess(msgspec.Struct, frozen=True):
    """A rank of this host."""

    rank: int
    pid: int
    flight: Path
    stream: RankStream | None = None  # its stream; None before it has connected

    @classmethod
    def of(cls, stream: RankStream) -> RankProcess | None:
        """Return the process of a stream; None if it is not on this host."""
        path, pid = stream.flight_path, stream.pid_here
        return cls(stream.rank, pid, path, stream) if pid is not None and path is not None else None

    def snapshots(self) -> ExternalSnapshots:
        """Return what takes snapshots of it."""
        return ExternalSnapshots(self.rank, self.pid, self.flight)


class UnconnectedRanks:
    """The ranks of one run that have not connected: C code took the GIL before their recorder came to it.

    Such a rank has a flight file that it holds, which names its job.
    """

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._known: dict[Path, dict[str, Any]] = {}

    def find(self) -> list[RankProcess]:
        """Return the live processes of these ranks, without ranks that several processes claim to be.

        Programs that a rank starts inherit its variables, and so claim to be that rank.
        """
        if self._run.is_complete:
            self._known.clear()
            return []

        paths = find_unclaimed((default_folder(), *disk_folders(self._run.path.parent)))
        self._known = {path: self._known.get(path) or flight_identity(path) for path in paths}
        found: dict[int, list[RankProcess]] = {}
        for path, facts in self._known.items():
            # Read again: a rank that has connected elsewhere since has learned its run there.
            pid = pid_here(path, facts["pid"], facts["start_ticks"]) if self._is_absent(facts) else None
            if pid is not None and is_alive(path) and may_be_of(flight_identity(path), self._run.id):
                self._run.expect(facts)
                process = RankProcess(facts["rank"], pid, path)
                found.setdefault(process.rank, []).append(process)

        return [processes[0] for processes in found.values() if len(processes) == 1]

    def _is_absent(self, facts: dict[str, Any]) -> bool:
        """Whether a file's writer is a rank of this run that has not connected."""
        rank, process = facts.get("rank"), (facts.get("pid"), facts.get("start_ticks"))
        if facts.get("job") != self._run.key or facts.get("parent") or facts.get("boot_id") != boot_id():
            return False

        is_known = isinstance(rank, int) and 0 <= rank < WORLD_LIMIT and all(isinstance(each, int) for each in process)
        return is_known and self._run.lacks(facts)


class _Silence(msgspec.Struct):
    """A rank that is silent, and the snapshots of it."""

    snapshots: ExternalSnapshots
    longest_s: float = 0.0
    is_pending: bool = False


class SilentRanks:
    """The silent ranks of one run, also those that have never connected."""

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run, self._start = run, start
        self._absent = UnconnectedRanks(run)
        self._silences: dict[RankProcess, _Silence] = {}

    def check(self) -> None:
        """Notice who falls silent and who wakes, and take snapshots of the silent ones; once a second."""
        processes = [*self._connected(), *self._absent.find()]
        for process in self._silences.keys() - set(processes):
            self._leave(process)

        for process in processes:
            silence = self._silences.get(process)
            slots = (silence.snapshots if silence is not None else process.snapshots()).slots()
            if slots is None:
                continue

            quiet_s = silent_s(slots)
            if quiet_s >= FIRST_SILENT_S and not slots.is_ending:
                silence = self._silences.setdefault(process, _Silence(process.snapshots()))
                silence.longest_s = quiet_s
                if not silence.is_pending:
                    silence.is_pending = True
                    self._start(self._snapshot(process, silence))
            elif quiet_s < FIRST_SILENT_S and silence is not None:
                self._wake(process)

    def is_silent(self, stream: RankStream) -> bool:
        """Return whether a connected rank was silent at the last check."""
        return any(process.stream is stream for process in self._silences)

    @property
    def has_absent(self) -> bool:
        """Whether a process that has never connected was silent at the last check, or is on another host."""
        return bool(self._run.live.absent_elsewhere) or any(process.stream is None for process in self._silences)

    def _connected(self) -> list[RankProcess]:
        return [process for process in map(RankProcess.of, self._run.connected_ranks) if process is not None]

    def _leave(self, process: RankProcess) -> None:
        """Forget a process that has ended. If an absent one has connected meanwhile, its silence is over instead."""
        streams = [stream for stream in self._run.connected if stream.incarnation.pid == process.pid]
        if process.stream is None and any(stream.rank == process.rank for stream in streams):
            self._wake(process)
        else:
            del self._silences[process]

    def _wake(self, process: RankProcess) -> None:
        silence = self._silences.pop(process)
        if silence.snapshots.has_news and (snapshot := silence.snapshots.end(silence.longest_s)) is not None:
            store_snapshot(self._run, process.stream, snapshot)

    async def _snapshot(self, process: RankProcess, silence: _Silence) -> None:
        snapshot = await asyncio.to_thread(silence.snapshots.make)
        silence.is_pending = False
        if snapshot is None or self._silences.get(process) is not silence or self._run.ended:
            return

        if silence.snapshots.is_news(snapshot):
            store_snapshot(self._run, process.stream, snapshot)


def store_snapshot(run: ActiveRun, stream: RankStream | None, snapshot: RankSnapshot) -> None:
    """Store a snapshot that the rank has not made itself, and give it to the live verdict.

    Args:
        stream: of the rank; None before it has connected.
    """
    whose = {"attempt": run.attempt} if stream is None else {"stream": stream.id}
    run.store.event(SNAPSHOT, {**snapshot.to_row(), "t_ns": snapshot.at_ns, **whose})
    run.live.take_snapshot(snapshot, is_absent=stream is None)


def note_abort(run: ActiveRun) -> None:
    """Record that a run was found to hang, and is ended for that."""
    run.store.event(ABORT, {"why": "hang", "attempt": run.attempt})
    run.live.facts_builder.progress.was_aborted = True
