"""Looks at traced workers of this host whose recorder does not run; an aggregator sees its own host only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from traceml.database.silent_look import FIRST_SILENT_S, SilentLooks, silent_s
from traceml.launch.wire.flight_archive import find_live_flight

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SilentWorkers"]

_EVERY_S = 1.0


class SilentWorkers:
    """The silent workers of one job.

    Args:
        trace: the job's settings of tracing, as `start` has them.
        send: sends a look: rank, process, and the look as a row.
    """

    def __init__(self, trace: Mapping[str, Any], send: Callable[[int, int, dict[str, Any]], object]) -> None:
        self._trace, self._send = trace, send
        self._looks: dict[int, SilentLooks] = {}
        self._silent_s: dict[int, float] = {}
        self._checked_s = 0.0

    def check(self, workers: Iterable[tuple[int, int]]) -> None:
        """Look at who is silent, once a second; the stack of one takes 0.2 s, once while nothing changes.

        Args:
            workers: rank and process of those that run.
        """
        now_s = time.monotonic()
        if not self._trace.get("flights") or now_s - self._checked_s < _EVERY_S:
            return

        self._checked_s = now_s
        for rank, pid in workers:
            looks = self._looks_of(rank, pid)
            if looks is not None:
                self._check(looks, rank, pid)

    def _check(self, looks: SilentLooks, rank: int, pid: int) -> None:
        words = looks.words()
        if words is None or words.is_ending:
            return

        quiet_s = silent_s(words)
        if quiet_s >= FIRST_SILENT_S:
            self._silent_s[pid] = quiet_s
            look = looks.make()
            if look is not None and looks.is_news(look):
                self._send(rank, pid, look.to_row())
        elif pid in self._silent_s:
            look = looks.end(self._silent_s.pop(pid))
            del self._looks[pid]
            if look is not None:
                self._send(rank, pid, look.to_row())

    def _looks_of(self, rank: int, pid: int) -> SilentLooks | None:
        """Return the looks at a worker; None before it has a flight file."""
        if pid not in self._looks:
            path = find_live_flight(pid, self._trace["run_id"], runs_dir=self._trace.get("runs_dir"))
            if path is None:
                return None

            self._looks[pid] = SilentLooks(rank, pid, path)

        return self._looks[pid]
