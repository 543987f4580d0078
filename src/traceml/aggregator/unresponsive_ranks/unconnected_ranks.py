"""Processes of ranks of this host, also of those that have never connected: C code took the GIL before their recorder
came to it. Such a rank has a flight file that it holds, which names its job.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from traceml.clock import boot_id
from traceml.database.external_snapshots import ExternalSnapshots
from traceml.database.flight.flight_folders import default_folder, disk_folders
from traceml.database.flight.flight_owner import find_unclaimed, is_alive, pid_here
from traceml.database.flight.postmortem import flight_identity, may_be_of
from traceml.transport.hello import WORLD_LIMIT

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import Stream

__all__ = ["RankProcess", "UnconnectedRanks"]


class RankProcess(msgspec.Struct, frozen=True):
    """A rank of this host.

    Attributes:
        stream: its stream; None before it has connected.
    """

    rank: int
    pid: int
    flight: Path
    stream: Stream | None = None

    @classmethod
    def of(cls, stream: Stream) -> RankProcess | None:
        """Return the process of a stream; None if it is not on this host."""
        path, pid = stream.flight_path, stream.pid_here
        return cls(stream.rank, pid, path, stream) if pid is not None and path is not None else None

    def snapshots(self) -> ExternalSnapshots:
        """Return what takes snapshots of it."""
        return ExternalSnapshots(self.rank, self.pid, self.flight)


class UnconnectedRanks:
    """The ranks of one run that have not connected."""

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
