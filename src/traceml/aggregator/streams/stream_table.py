"""Streams of a run, found by process, by rank, or by the report of an exit."""

from __future__ import annotations

import socket

from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.transport.exit_report import ExitReport

__all__ = ["StreamTable"]


class StreamTable:
    """Streams of a run.

    Attributes:
        all: in the order in which they came.
        disconnected: those without a connection that have not ended, as keys.
        starters: recorders of the processes that have started ranks of a group.
    """

    def __init__(self) -> None:
        self.all: list[RankStream] = []
        self.disconnected: dict[RankStream, None] = {}
        self.starters: set[str] = set()
        self._current: dict[tuple[int, int], RankStream] = {}
        self._by_incarnation: dict[tuple[Incarnation, int], RankStream] = {}
        self._by_recorder: dict[str, list[RankStream]] = {}
        self._by_pid: dict[int, list[RankStream]] = {}
        self._by_rank: dict[int, list[RankStream]] = {}

    def add(self, stream: RankStream) -> None:
        """Add a stream; a rank's newest one takes the place of the one before."""
        self.all.append(stream)
        if stream.is_helper:
            stream.is_diagnosed = False
        else:
            self._current[stream.attempt, stream.rank] = stream

        self._by_incarnation[stream.incarnation, stream.rank] = stream
        self._by_recorder.setdefault(stream.incarnation.recorder, []).append(stream)
        self._by_pid.setdefault(stream.incarnation.pid, []).append(stream)
        self._by_rank.setdefault(stream.rank, []).append(stream)

    def remove_rank(self, stream: RankStream) -> None:
        """Make a rank's stream one of a helper."""
        del self._current[stream.attempt, stream.rank]
        stream.is_helper, stream.is_diagnosed = True, False

    def of_rank(self, attempt: int, rank: int) -> RankStream | None:
        """Return the newest stream of a rank in an attempt."""
        return self._current.get((attempt, rank))

    def of_attempt(self, attempt: int) -> list[RankStream]:
        """Return the newest stream of each rank in an attempt."""
        return [stream for (number, _), stream in self._current.items() if number == attempt]

    def of_recorder(self, attempt: int, recorder: str) -> list[RankStream]:
        """Return the ranks of an attempt whose newest stream is that of a recorder."""
        found = [stream for stream in self._by_recorder.get(recorder, ()) if stream.attempt == attempt]
        return [stream for stream in found if self._current.get((attempt, stream.rank)) is stream]

    def of_process(self, incarnation: Incarnation, rank: int) -> RankStream | None:
        """Return the stream of a recorder that was connected before."""
        return self._by_incarnation.get((incarnation, rank))

    def of_exit(self, report: ExitReport) -> RankStream | None:
        """Return the stream of an exit report: by its process, else by the rank, if that has not ended yet."""
        of_pid = () if report.pid is None else self._by_pid.get(report.pid, ())
        host = report.host or socket.gethostname()
        by_pid = [stream for stream in of_pid if stream.incarnation.host == host]  # containers have the same few pids
        of_rank = () if report.rank is None else self._by_rank.get(report.rank, ())
        return next(reversed(by_pid or [stream for stream in of_rank if not stream.ended]), None)
