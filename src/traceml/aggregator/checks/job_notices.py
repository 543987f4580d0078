"""Notices in the output of a job that hangs, or waits for a lost rank: its log may be all that its user sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks
from traceml.diagnosis.kinds import Kind

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import StreamPeer
    from traceml.diagnosis.findings import Finding

__all__ = ["JobNotices"]

# A launcher ends the other ranks of a lost one, or starts all again: then the job's own output says so.
_AFTER_S = {Kind.HANG: 0.0, Kind.RANK_LOST: 40.0}


class JobNotices:
    """Asks a rank of a run to print that the job is stuck, once for each attempt, and when it continues.

    Args:
        silent: the ranks of the run whose recorder does not run: they could not print it.
        on_mute: takes the facts of the line if no rank of a job that runs can print it; absent without a launcher.
    """

    def __init__(
        self,
        run: ActiveRun,
        silent: SilentRanks,
        now_s: Callable[[], float] = time.monotonic,
        on_mute: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._run, self._silent, self._now_s, self._on_mute = run, silent, now_s, on_mute
        self._since_s: float | None = None
        self._printed_of: int | None = None  # the attempt that was reported last, while it is stuck

    def check(self, findings: Sequence[Finding]) -> None:
        """Take the findings of the last diagnosis, the verdict first."""
        verdict = findings[0] if findings and findings[0].kind in _AFTER_S else None
        if verdict is None:
            if self._printed_of is not None and self._run.live.facts_builder.progress.has_snapshots:
                return  # it makes no progress, though the verdict is another one

            goes_on, self._printed_of, self._since_s = self._printed_of == self._run.attempt, None, None
            if goes_on:
                self._send({})
            return

        now_s = self._now_s()
        self._since_s = now_s if self._since_s is None else self._since_s
        is_due = self._printed_of != self._run.attempt and now_s - self._since_s >= _AFTER_S[verdict.kind]
        if is_due and self._send({"kind": str(verdict.kind), "headline": verdict.headline}):
            self._printed_of = self._run.attempt

    def _send(self, facts: dict[str, Any]) -> bool:
        """Send it to the first rank that can print, else to the launcher; return whether there is one."""
        peer, args = self._peer(), {**facts, "run_dir": str(self._run.path)}
        if peer is not None:
            peer.send({"t": "command", "id": 0, "name": "notice", "args": args})
            return True

        # C code may have taken the GIL before a rank has connected. Of an ended job, its end says more.
        is_running = self._run.connected_ranks or self._silent.has_absent
        if self._on_mute is None or not is_running:
            return False

        self._on_mute(args)
        return True

    def _peer(self) -> StreamPeer | None:
        able = [each for each in self._run.connected_ranks if not self._silent.is_silent(each)]
        return min(able, key=lambda each: each.rank).peer if able else None
