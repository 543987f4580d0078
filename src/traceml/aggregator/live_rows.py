"""Rows as they arrive, for the live verdict: one scatter per tick for all ranks, one diagnosis a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from traceml.aggregator.streams.stream import RankStream
from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO, NAMES
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.database.store.records import names_of
from traceml.diagnosis.facts.ends import EndingSignal, RankExit
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.hangs.hang import hang
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import slots_for
from traceml.diagnosis.steps.representatives import Representatives
from traceml.transport.framing import decode_log

__all__ = ["LiveRows"]

_LOGS = {NAMES.name, INFO.name}
_HUNG_STEPS = 64  # enough to know how long steps take


class LiveRows:
    """The newest steps of a run's ranks, and the facts that explain them."""

    def __init__(self, world_size: int) -> None:
        self._start_over(world_size)
        self.on_loaded: Callable[[RankStream, dict[str, Any]], None] = _ignore
        """Called when a rank has read a file before its first step: its `loaded` row."""
        self.fresh = False
        """Whether something arrived since the last diagnosis."""
        self._absent: dict[int, RankSnapshot] = {}  # the newest of each rank that has not connected
        self.absent_elsewhere: set[int] = set()
        """Those of other hosts, whose agents have sent it."""

    def resize(self, world_size: int) -> None:
        """Drop the kept steps and keep new ones: how many depends on the number of ranks."""
        self.intake.resize(slots_for(world_size), world_size)
        self.intake.keep_history(world_size)
        self.facts_builder.world_size = world_size

    @property
    def representatives(self) -> Representatives:
        """Ranks that represent others of their host, where hosts are merged."""
        return self.intake.kept.representatives

    def begin_attempt(self) -> None:
        """Forget the rows and facts of the previous attempt, as a report does, and judge again.

        They are of other processes: each numbers its texts, such as the lines that it was seen in, anew.
        """
        before = self.facts_builder
        self._absent.clear()
        self.absent_elsewhere.clear()
        self._start_over(before.world_size)
        self.set_hang_rule(before.progress.timeout_s, aborts=before.progress.aborts)
        self.fresh = True

    def mark_unreachable(self, host: str) -> None:
        """Record that a host is out of reach: its ranks are not compared."""
        self.representatives.mark_unreachable(host)
        self.fresh = True

    def join(self, stream: RankStream) -> None:
        """Add a rank; steps of an earlier incarnation are forgotten."""
        self.resume(stream)
        if not stream.is_diagnosed:
            return

        self.intake.clear(stream.rank)
        self.facts_builder.join(stream.rank)
        self.absent_elsewhere.discard(stream.rank)
        if (stood := self._absent.pop(stream.rank, None)) is not None:  # it may connect only to end
            self.take_snapshot(stood)

    def resume(self, stream: RankStream) -> None:
        """Add a rank as an earlier aggregator left it."""
        self.facts_builder.host(stream.rank, stream.incarnation.host)
        self.note_checkpoint(stream)
        if stream.is_diagnosed:
            self.intake.names[stream.rank] = stream.names

    def note_checkpoint(self, stream: RankStream) -> None:
        """Record the checkpoint that a rank has read: one may read it for all."""
        if stream.is_diagnosed:
            self.facts_builder.resumes_at = max(self.facts_builder.resumes_at, stream.resumes_at)

    def set_hang_rule(self, timeout_s: float, *, aborts: bool) -> None:
        """Set when a job hangs, and whether it is ended then, before any rank has told."""
        self.facts_builder.progress.timeout_s, self.facts_builder.progress.aborts = timeout_s, aborts

    def note_ending(self, ended_by: EndingSignal) -> None:
        """Record the signal that ended the job."""
        self.facts_builder.ended_by = ended_by

    def end(self, stream: RankStream) -> None:
        """Record how a rank ended."""
        self.intake.end(RankExit.from_facts(stream.rank, str(stream.state), stream.exit, stream.incarnation.host))
        self.fresh = True

    def take(self, stream: RankStream, table: str, data: bytes) -> None:
        """Take rows that the store has taken."""
        if table in _LOGS:
            self._take_log(stream, table, data)
        elif stream.is_diagnosed:
            self.intake.add(table, stream.rank, data)

    def take_snapshot(self, snapshot: RankSnapshot, *, is_absent: bool = False) -> None:
        """Take a snapshot of a rank that another process has made.

        Args:
            is_absent: whether the rank has not connected yet.
        """
        if is_absent:
            self._absent[snapshot.rank] = snapshot

        self.facts_builder.progress.take_snapshot(snapshot)

    def snapshot_from_outside(self, rank: int) -> RankSnapshot | None:
        """Return the newest snapshot of a rank without progress, if another process has made it."""
        snapshot = self.facts_builder.progress.snapshot_of(rank)
        return snapshot if snapshot is not None and snapshot.answered in ("signal", "kernel") else None

    def has_hung(self, state: str) -> bool:
        """Return whether a run that ended in this state had hung before.

        Args:
            state: finished, stopped, failed or lost.
        """
        self.facts_builder.state = state
        window, facts = self.intake.snapshot(_HUNG_STEPS)
        return hang(window, facts) is not None

    def final_findings(self, state: str) -> list[Finding]:
        """Return the findings of a run that ended in this state.

        Args:
            state: finished, stopped, failed, hung or lost.
        """
        self.facts_builder.state = state
        window, facts = self.intake.snapshot(_HUNG_STEPS)
        return diagnose(window, facts)

    def scatter(self) -> None:
        """Put the rows that arrived since the last tick among the kept ones."""
        self.fresh |= self.intake.flush()

    def _start_over(self, world_size: int) -> None:
        self.intake = RowIntake(slots_for(world_size), world_size)
        self.intake.keep_history(world_size)
        self.facts_builder = self.intake.facts_builder
        self.facts_builder.world_size = world_size

    def _take_log(self, stream: RankStream, table: str, data: bytes) -> None:
        for row in decode_log(data):
            (_take_name if table == NAMES.name else self._take_info)(stream, row)

        if table == NAMES.name and stream.is_diagnosed:
            self.intake.names[stream.rank] = stream.names

    def _take_info(self, stream: RankStream, row: dict[str, Any]) -> None:
        if row.get("kind") == InfoKind.EXIT:
            # Kept with the stream too: how a rank ended is needed when its connection is gone. The code that its
            # launcher has reported is that of the process, which may have ended otherwise than its script.
            known = ("kind", "t_ns", "code") if stream.reported_dead else ("kind", "t_ns")
            stream.exit.update({key: value for key, value in row.items() if key not in known})
            if stream.is_diagnosed:
                self.facts_builder.progress.info(stream.rank, row)  # what follows is no progress
        elif row.get("kind") == InfoKind.LOADED:
            self.on_loaded(stream, row)
        elif stream.is_diagnosed:
            self.facts_builder.info(stream.rank, row)


def _ignore(_stream: RankStream, _row: dict[str, Any]) -> None:
    """Ignore a row."""


def _take_name(stream: RankStream, row: dict[str, Any]) -> None:
    stream.names.update(names_of([row]))
