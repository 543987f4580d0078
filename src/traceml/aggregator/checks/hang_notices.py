"""Notices of hangs: one rank of a job that hangs prints a line, as its log may be all that anybody looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks
from traceml.diagnosis.kinds import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import StreamPeer
    from traceml.diagnosis.findings import Finding

__all__ = ["HangNotices"]


class HangNotices:
    """Asks a rank of a run to say that the job hangs, and when it goes on.

    Args:
        silent: the ranks of the run whose recorder does not run: they could not print it.
    """

    def __init__(self, run: ActiveRun, silent: SilentRanks) -> None:
        self._run, self._silent = run, silent
        self._told_of: int | None = None  # the attempt whose hang was told last, and lasts

    def check(self, findings: Sequence[Finding]) -> None:
        """Take the findings of the last diagnosis, the verdict first."""
        hang = findings[0] if findings and findings[0].kind is Kind.HANG else None
        if hang is None and self._told_of is not None:
            goes_on, self._told_of = self._told_of == self._run.attempt, None
            if goes_on:
                self._send({})
        elif hang is not None and self._told_of != self._run.attempt and self._send({"headline": hang.headline}):
            self._told_of = self._run.attempt

    def _send(self, facts: dict[str, Any]) -> bool:
        """Send it to the first rank that can print; return whether there is one."""
        peer = self._peer()
        if peer is not None:
            args = {**facts, "run_dir": str(self._run.path)}
            peer.send({"t": "command", "id": 0, "name": "hang_notice", "args": args})

        return peer is not None

    def _peer(self) -> StreamPeer | None:
        able = [each for each in self._run.connected if each.is_diagnosed and not each.is_helper]
        able = [each for each in able if not self._silent.is_silent(each)]
        return min(able, key=lambda each: each.rank).peer if able else None
