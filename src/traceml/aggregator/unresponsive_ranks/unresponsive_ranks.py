"""Watch over the ranks of this host whose recorder does not run: a snapshot of each once a second.

A snapshot is stored as an event of the run. Agents of a launch take those of the ranks of other hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from traceml.aggregator.unresponsive_ranks.unconnected_ranks import RankProcess, UnconnectedRanks
from traceml.database.external_snapshots import FIRST_SILENT_S, ExternalSnapshots, silent_s
from traceml.database.snapshots import SNAPSHOT

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import Stream
    from traceml.database.snapshots import RankSnapshot

__all__ = ["UnresponsiveRanks", "store_snapshot"]


class _Silence(msgspec.Struct):
    """A rank that is silent, and the snapshots of it."""

    snapshots: ExternalSnapshots
    longest_s: float = 0.0
    is_pending: bool = False


class UnresponsiveRanks:
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

    def _connected(self) -> list[RankProcess]:
        ranks = [stream for stream in self._run.connected if stream.is_diagnosed and not stream.is_helper]
        return [process for process in map(RankProcess.of, ranks) if process is not None]

    def _leave(self, process: RankProcess) -> None:
        """Forget a process that has gone; one that was absent may have connected, so its silence is over."""
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


def store_snapshot(run: ActiveRun, stream: Stream | None, snapshot: RankSnapshot) -> None:
    """Store a snapshot that the rank has not made itself, and give it to the live verdict.

    Args:
        stream: of the rank; None before it has connected.
    """
    whose = {"attempt": run.attempt} if stream is None else {"stream": stream.id}
    run.store.event(SNAPSHOT, {**snapshot.to_row(), "t_ns": snapshot.at_ns, **whose})
    run.live.take_snapshot(snapshot, is_absent=stream is None)
