"""Watch over the ranks of this host whose recorder does not run: a snapshot of each once a second.

A snapshot is stored as an event of the run. Agents of a launch take those of the ranks of other hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traceml.database.silent_snapshots import FIRST_SILENT_S, SilentSnapshots, silent_s
from traceml.database.snapshots import SNAPSHOT

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams import Stream
    from traceml.database.snapshots import RankSnapshot

__all__ = ["SilentRanks", "silent_snapshots", "store_snapshot"]


@dataclass(slots=True)
class _Silence:
    """A rank that is silent, and the snapshots of it."""

    snapshots: SilentSnapshots
    longest_s: float = 0.0
    is_pending: bool = False


class SilentRanks:
    """The silent ranks of one run.

    Args:
        run: the run.
        start: starts a coroutine.
    """

    def __init__(self, run: ActiveRun, start: Callable[[Any], None]) -> None:
        self._run, self._start = run, start
        self._silences: dict[Stream, _Silence] = {}

    def check(self) -> None:
        """Notice who falls silent and who wakes, and take snapshots of the silent ones; once a second."""
        here = [stream for stream in self._run.connected if stream.seen_here]
        connected = [stream for stream in here if stream.is_diagnosed and not stream.is_helper]
        for stream in self._silences.keys() - set(connected):
            del self._silences[stream]

        for stream in connected:
            snapshots = silent_snapshots(stream)
            words = snapshots.words() if snapshots is not None else None
            if snapshots is None or words is None:
                continue

            quiet_s = silent_s(words)
            if quiet_s >= FIRST_SILENT_S and not words.is_ending:
                silence = self._silences.setdefault(stream, _Silence(snapshots))
                silence.longest_s = quiet_s
                if not silence.is_pending:
                    silence.is_pending = True
                    self._start(self._snapshot(stream, silence))
            elif quiet_s < FIRST_SILENT_S and stream in self._silences:
                self._wake(stream)

    def _wake(self, stream: Stream) -> None:
        silence = self._silences.pop(stream)
        if silence.snapshots.has_news and (snapshot := silence.snapshots.end(silence.longest_s)) is not None:
            store_snapshot(self._run, stream, snapshot)

    async def _snapshot(self, stream: Stream, silence: _Silence) -> None:
        snapshot = await asyncio.to_thread(silence.snapshots.make)
        silence.is_pending = False
        if snapshot is None or self._silences.get(stream) is not silence or self._run.ended:
            return

        if silence.snapshots.is_news(snapshot):
            store_snapshot(self._run, stream, snapshot)


def silent_snapshots(stream: Stream) -> SilentSnapshots | None:
    """Return the snapshots of a stream's process; None if it is not on this host."""
    path = stream.flight_path
    if not stream.seen_here or path is None:
        return None

    return SilentSnapshots(stream.rank, stream.incarnation.pid, path)


def store_snapshot(run: ActiveRun, stream: Stream, snapshot: RankSnapshot) -> None:
    """Store a snapshot that the rank has not made itself, and give it to the live verdict."""
    run.store.event(SNAPSHOT, {**snapshot.to_row(), "t_ns": snapshot.at_ns, "stream": stream.id})
    run.live.take_snapshot(snapshot)
