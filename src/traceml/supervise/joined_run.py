"""Client of a run whose aggregator is on another node: reports how the ranks of this node ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.errors import TraceMLError
from traceml.supervise.aggregator_client import AggregatorClient
from traceml.transport import auth

if TYPE_CHECKING:
    from traceml.database.snapshots.silent_workers import SilentWorker
    from traceml.supervise.node_run import NodeRunReport
    from traceml.transport.client import Connection
    from traceml.transport.exit_report import ExitReport

__all__ = ["JoinedRun"]

_CONNECT_S, _ANSWER_S = 2.0, 10.0
_PART_BYTES = 4 << 20

_log = logging.getLogger("traceml")


class JoinedRun:
    """A run of another node that this node's ranks belong to.

    Args:
        report: of the rendezvous.
        runs_dir: folder for the files of this node's ranks that have no folder in memory.
    """

    def __init__(self, report: NodeRunReport, runs_dir: Path) -> None:
        from traceml.database.snapshots.silent_workers import SilentWorkers
        from traceml.inspection.cgroups import OomWatch

        assert report.location is not None
        self.location = location = report.location
        self.node, self.run_id, self.run_dir = location.node, location.run_id, report.run_dir
        self.client = AggregatorClient(report.host, location.port, report.token, location.run_id, location.tls)
        self._runs_dir = str(runs_dir)
        self._host = socket.gethostname()
        self.silent_workers = SilentWorkers(self.run_id, self._runs_dir, self._send_snapshot)
        self._oom_watch = OomWatch()
        self._published = self._publish()

    def __repr__(self) -> str:
        return f"<run {self.run_id} of node {self.node}>"

    def report_ends(self, exits: Iterable[ExitReport]) -> bool:
        """Report ends of ranks, with the files that they left; return whether the aggregator knows now."""
        from msgspec.structs import replace

        try:
            with contextlib.closing(self.client.connect(_CONNECT_S)) as connection:
                shift_s = _clock_shift_s(connection)
                for ended in exits:
                    seen_s = None if ended.time is None else ended.time + shift_s
                    self._report_end(connection, replace(ended, time=seen_s))
        except (TraceMLError, OSError) as error:
            _log.debug("the end of a rank is not reported to %s: %s", self.node, error)
            return False

        return True

    def finish(self, exits: Sequence[ExitReport], ended_by: Mapping[str, Any] | None) -> None:
        """Report the ends that are not known there yet, and that no more follow.

        Args:
            ended_by: the signal that asked for the end, in the form of the command `finish`.
        """
        self.report_ends(exits)
        with (
            contextlib.suppress(TraceMLError, OSError),  # it is gone, and waits for nobody
            contextlib.closing(self.client.connect(_ANSWER_S, tries=1)) as connection,
        ):
            if ended_by is not None:
                ended_by = {**ended_by, "time": ended_by["time"] + _clock_shift_s(connection)}

            left = {"host": self._host, "pid": os.getpid(), "ended_by": ended_by}
            connection.request("leave", left, timeout_s=_ANSWER_S)

        self.withdraw()

    def withdraw(self) -> None:
        """Let commands of this host no longer find the run."""
        if self._published is not None:
            self._published.unlink(missing_ok=True)

    def _publish(self) -> Path | None:
        """Let commands of this host, `traceml stacks` for example, find the run."""
        at = self.client
        try:
            return auth.publish_joined(
                at.host, at.port, at.token, run_dir=Path(self.run_dir), node=self.node, tls=at.tls
            )
        except OSError as error:
            _log.warning("commands on this host do not find the run of %s: %s", self.node, error)
            return None

    def _report_end(self, connection: Connection, ended: ExitReport) -> None:
        from msgspec.structs import replace

        from traceml.database.flight.flight_archive import packed_flight

        oom = self._oom_watch.killed() if ended.exitcode == -signal.SIGKILL and not ended.stopped else None
        ended = replace(ended, host=self._host, oom=oom)
        with packed_flight(ended.pid or 0, self.run_id, runs_dir=self._runs_dir) as archive:
            if archive is not None:
                path = self._send_archive(connection, f"{self._host}-{ended.rank}-{ended.pid}", archive.data)
                ended = replace(ended, flight=path, crash=archive.crash_text or None)

            connection.request("exits", {"exits": [ended.to_message()]}, timeout_s=_ANSWER_S)

    def _send_archive(self, connection: Connection, name: str, data: bytes) -> str:
        """Send an archive in parts; return the path of the copy of the flight file."""
        reply: dict[str, Any] = {}
        for at in range(0, len(data), _PART_BYTES):
            end = at + _PART_BYTES
            part = {"name": name, "data": data[at:end], "offset": at, "last": end >= len(data)}
            reply = connection.request("archive", part, timeout_s=_ANSWER_S)

        return str(reply["path"])

    def _send_snapshot(self, worker: SilentWorker) -> None:
        self.client.send_snapshot({"host": self._host, **worker._asdict()})


def _clock_shift_s(connection: Connection) -> float:
    """Return the aggregator's wall clock minus that of this node: they may differ by more than a job takes."""
    measured = connection.measure_clock(is_sent=False)
    return 0.0 if measured is None else measured.shift_ns / 1e9
