"""Watch over the ranks of this host whose recorder does not run: each second another process looks at them.

A look is stored as an event of the run. Agents of a launch look at the ranks of the other hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traceml.database.looks import LOOK
from traceml.database.silent_look import FIRST_SILENT_S, SilentLooks, silent_s

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams import Stream
    from traceml.database.looks import RankLook

__all__ = ["SilentRanks", "silent_looks", "take_look"]


@dataclass(slots=True)
class _Silence:
    """A rank that is silent, and the looks at it."""

    looks: SilentLooks
    longest_s: float = 0.0
    is_looking: bool = False


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
        """Notice who falls silent and who wakes, and look at those who are silent; once a second."""
        connected = [stream for stream in self._run.connected if stream.in_window and not stream.is_helper]
        for stream in self._silences.keys() - set(connected):
            del self._silences[stream]

        for stream in connected:
            looks = silent_looks(stream)
            words = looks.words() if looks is not None else None
            if looks is None or words is None:
                continue

            quiet_s = silent_s(words)
            if quiet_s >= FIRST_SILENT_S and not words.is_ending:
                silence = self._silences.setdefault(stream, _Silence(looks))
                silence.longest_s = quiet_s
                if not silence.is_looking:
                    silence.is_looking = True
                    self._start(self._look(stream, silence))
            elif quiet_s < FIRST_SILENT_S and stream in self._silences:
                self._wake(stream)

    def _wake(self, stream: Stream) -> None:
        silence = self._silences.pop(stream)
        if silence.looks.has_news and (look := silence.looks.end(silence.longest_s)) is not None:
            take_look(self._run, stream, look)

    async def _look(self, stream: Stream, silence: _Silence) -> None:
        look = await asyncio.to_thread(silence.looks.make)
        silence.is_looking = False
        if look is None or self._silences.get(stream) is not silence or self._run.ended:
            return

        if silence.looks.is_news(look):
            take_look(self._run, stream, look)


def silent_looks(stream: Stream) -> SilentLooks | None:
    """Return the looks at a stream's process; None if it is not on this host."""
    path = stream.flight_path
    if not stream.seen_here or path is None:
        return None

    return SilentLooks(stream.rank, stream.incarnation.pid, path)


def take_look(run: ActiveRun, stream: Stream, look: RankLook) -> None:
    """Store a look that the rank has not made itself, and give it to the live verdict."""
    run.store.event(LOOK, {**look.to_row(), "t_ns": look.at_ns, "stream": stream.id})
    run.live.look(look)
