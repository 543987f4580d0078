"""Watch over the ranks of this host whose recorder does not run: each second another process looks at them.

A look is stored when it differs from the one before, else every 10 s, as an event of the run. The first one of a
silence comes after 3 s: loading a library holds the GIL for a second or two.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from traceml.aggregator.silence.silent_look import SilentLooks, silent_s
from traceml.database.looks import LOOK

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams import Stream
    from traceml.database.looks import RankLook

__all__ = ["SilentRanks", "silent_looks", "take_look"]

_FIRST_S, _STAMP_S = 3.0, 10.0
_VOLATILE = {"at_ns", "quiet_s", "cpu_share", "io_bytes_per_s", "is_last"}
_BUSY_CORES = 0.2


@dataclass(slots=True)
class _Silence:
    """A rank that is silent, and the looks at it."""

    looks: SilentLooks
    longest_s: float = 0.0
    sent_s: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)
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
            if quiet_s >= _FIRST_S and not words.is_ending:
                silence = self._silences.setdefault(stream, _Silence(looks))
                silence.longest_s = quiet_s
                if not silence.is_looking:
                    silence.is_looking = True
                    self._start(self._look(stream, silence))
            elif quiet_s < _FIRST_S and stream in self._silences:
                self._wake(stream)

    def _wake(self, stream: Stream) -> None:
        silence = self._silences.pop(stream)
        if silence.told and (look := silence.looks.end(silence.longest_s)) is not None:
            take_look(self._run, stream, look)

    async def _look(self, stream: Stream, silence: _Silence) -> None:
        look = await asyncio.to_thread(silence.looks.make)
        silence.is_looking = False
        if look is None or self._silences.get(stream) is not silence or self._run.ended:
            return

        told = {name: value for name, value in look.to_row().items() if name not in _VOLATILE}
        told["busy"] = (look.cpu_share or 0) >= _BUSY_CORES
        now_s = time.monotonic()
        if told != silence.told or now_s - silence.sent_s >= _STAMP_S:
            silence.told, silence.sent_s = told, now_s
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
