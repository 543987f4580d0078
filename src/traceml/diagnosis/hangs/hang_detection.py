"""Decision whether a job hangs: no rank makes progress, for longer than is normal in this run.

Also afterwards: a job that somebody ended while it hung has hung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from traceml.database.snapshots.rank_snapshot import FrameSnapshot, ProcessSnapshot, RankSnapshot, user_line
from traceml.database.states import RunStatus
from traceml.diagnosis.facts.ends import EndingSignal, RankExit, ended_badly
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.rank_progress import JobProgress, RankProgress
from traceml.diagnosis.hangs.blame import Blame, blame
from traceml.diagnosis.hangs.rank_state import is_busy, is_expected_wait, is_in_long_call

__all__ = ["DetectedHang", "detect_hang"]

CERTAIN_S = 5.0
"""Ranks that can never meet hang after this many seconds, and so does a stopped process."""
BUSY_FACTOR = 5
"""A rank that computes gets this many times `hang_timeout`."""
AWAITED_FACTOR = 2
"""And this many if other ranks wait for it in a collective, unless it reads or writes: it may load a checkpoint.
Also if it computes in one call of C that holds the GIL, which seldom takes so long."""
ENDED_S = 10.0
"""A job that was ended hung if it had made no progress for this long, and for far longer than its steps take."""

_PAUSE_FACTOR, _BUSY_PAUSE_FACTOR = 1.5, 3
"""A pause that ended by itself shows that the job may pause for this many times as long, and if it computes."""
_STEP_FACTOR = 3
"""So does a slow step, the 99th percentile."""
_ENDED_STEP_FACTOR, _ENDED_GAP_FACTOR = 20, 2
"""A job that was ended hung if it made no progress for this many slow steps, and longest gaps between rows."""
# A recorder that sent something so recently, and no snapshot, has seen progress. Large jobs send samples less often.
_ALIVE_S, _RANKS_PER_S, _SENDING_S = 15.0, 100, 120.0


class DetectedHang(msgspec.Struct, frozen=True):
    """A job that hangs, or has hung."""

    snapshots: Mapping[int, RankSnapshot]  # of the ranks without progress, by rank
    blame: Blame
    quiet_s: float  # seconds since any rank made progress
    is_busy: bool  # whether a rank computes: it is slow, or in an endless loop
    ended: Mapping[int, RankExit]  # how ranks have ended that the others wait for
    is_over: bool = False
    timed_out: tuple[int, ...] = ()  # ranks whose wait the time limit of a collective has ended
    raised: RankExit | None = None  # the end of a rank that blocks the others, or is stuck, by an exception of its own

    @property
    def stuck(self) -> list[RankSnapshot]:
        """Snapshots of the ranks that block the others; of all, where none is named."""
        named = self.blame.ranks or sorted(self.snapshots)
        return [self.snapshots[rank] for rank in named if rank in self.snapshots]


def detect_hang(facts: JobFacts, step_p99_s: float) -> DetectedHang | None:
    """Return the hang of a job; None while it makes progress, and where it may be normal.

    Args:
        step_p99_s: 99th percentile of its step time; 0 if unknown.
    """
    if facts.progress is None or facts.state == RunStatus.FINISHED:
        return None

    if facts.state == RunStatus.RUNNING and not ended_badly(facts.exits):
        return _now(facts, facts.progress, step_p99_s)

    return _afterwards(facts, facts.progress, step_p99_s)


def _now(facts: JobFacts, progress: JobProgress, step_p99_s: float) -> DetectedHang | None:
    ended = {**_returned(progress), **{each.rank: each for each in facts.exits}}
    alive = {rank: each for rank, each in progress.ranks.items() if rank not in ended}
    alive_s = _ALIVE_S + min(2 * facts.world_size / _RANKS_PER_S, _SENDING_S)
    snapshots = _snapshots(list(alive.values()), alive_s)
    if snapshots is None:
        return None

    found = _judged(snapshots, ended, facts, progress)
    return found if found is not None and found.quiet_s >= _limit_s(found, progress, step_p99_s) else None


def _returned(progress: JobProgress) -> dict[int, RankExit]:
    """Return the ends of ranks whose launched function or script is over: they come to no further collective."""
    return {
        rank: RankExit(rank=rank, last_step=each.returned_at, returned=not each.ran_script)
        for rank, each in progress.ranks.items()
        if each.returned_at is not None
    }


def _snapshots(ranks: Sequence[RankProgress], alive_s: float) -> dict[int, RankSnapshot] | None:
    """Return the snapshots; None if there are none, or if a rank makes progress."""
    if any(each.snapshot is None and each.alive_s < alive_s for each in ranks):
        return None

    return {each.rank: each.snapshot for each in ranks if each.snapshot is not None} or None


def _judged(
    snapshots: Mapping[int, RankSnapshot], ended: Mapping[int, RankExit], facts: JobFacts, progress: JobProgress
) -> DetectedHang | None:
    snapshots = _with_blocking_ranks(snapshots, facts.hosts)
    is_alone = facts.world_size == 1
    if any(is_expected_wait(snapshot, is_alone=is_alone) for snapshot in snapshots.values()):
        return None

    quiet_s = min(snapshot.quiet_s for snapshot in snapshots.values())
    blamed = blame(snapshots, ended, facts.world_size)
    busy = any(
        rank not in blamed.waits and (is_busy(snapshot) or progress.ranks[rank].is_unsteady)
        for rank, snapshot in snapshots.items()
    )
    return DetectedHang(snapshots, blamed, quiet_s, busy, ended)


def _with_blocking_ranks(snapshots: Mapping[int, RankSnapshot], hosts: Mapping[int, str]) -> dict[int, RankSnapshot]:
    """Add to the processes that ranks and their workers wait for which ranks they are."""
    ranks = {(hosts.get(rank), each.pid): rank for rank, each in snapshots.items() if each.pid}

    def named(blocker: ProcessSnapshot | None, host: str | None) -> ProcessSnapshot | None:
        return blocker if blocker is None else replace(blocker, rank=ranks.get((host, blocker.pid)))

    return {
        rank: replace(
            each,
            blocker=named(each.blocker, hosts.get(rank)),
            workers=tuple(replace(worker, blocker=named(worker.blocker, hosts.get(rank))) for worker in each.workers),
        )
        for rank, each in snapshots.items()
    }


def _limit_s(found: DetectedHang, progress: JobProgress, step_p99_s: float) -> float:
    """Return how long the job may make no progress."""
    is_stopped = any(snapshot.process_state == "T" for snapshot in found.snapshots.values())
    if is_stopped or (found.blame.is_certain and not found.is_busy):
        return min(CERTAIN_S, progress.timeout_s)

    pause_s = progress.longest_quiet_s[any(snapshot.step >= 0 for snapshot in found.snapshots.values())]
    if found.is_busy:
        return max(_busy_factor(found) * progress.timeout_s, _BUSY_PAUSE_FACTOR * pause_s)

    return max(progress.timeout_s, _PAUSE_FACTOR * pause_s, _STEP_FACTOR * step_p99_s)


def _busy_factor(found: DetectedHang) -> int:
    others = [snapshot for rank, snapshot in found.snapshots.items() if rank not in found.blame.waits]
    is_awaited = bool(found.blame.waits) and not any(snapshot.transfers for snapshot in others)
    busy = [snapshot for snapshot in others if is_busy(snapshot)]
    is_one_call = bool(busy) and all(map(is_in_long_call, busy))
    return AWAITED_FACTOR if is_awaited or is_one_call else BUSY_FACTOR


def _afterwards(facts: JobFacts, progress: JobProgress, step_p99_s: float) -> DetectedHang | None:
    exits = {each.rank: each for each in facts.exits}
    finished = {rank: ended for rank, ended in exits.items() if ended.state == "finished"} | _returned(progress)
    ranks = [each for rank, each in progress.ranks.items() if rank not in finished]
    snapshots = {
        each.rank: _with_exit(each.snapshot, exits.get(each.rank)) for each in ranks if each.snapshot is not None
    }
    # A process that lacks memory hardly runs, until the kernel ends it for that.
    if not snapshots or len(snapshots) < len(ranks) or any(ended.oom == "group" for ended in exits.values()):
        return None

    if facts.world_size == 1 and any(_has_continued(each, exits.get(rank)) for rank, each in snapshots.items()):
        return None

    by_rows = [snapshot for snapshot in snapshots.values() if snapshot.answered == "rows"]
    if not all(snapshot.in_step for snapshot in by_rows):
        return None  # an evaluation, as far as the rows tell

    found = _judged(snapshots, finished, facts, progress)
    if found is None:
        return None

    timed_out = tuple(sorted(rank for rank, ended in exits.items() if ended.reached_time_limit))
    raised = next((exits[each.rank] for each in found.stuck if _has_raised(exits.get(each.rank), found.blame)), None)
    found = msgspec.structs.replace(found, timed_out=timed_out, raised=raised, is_over=True)
    started = any(each.step >= 0 for each in ranks)
    usual_s = (
        max(ENDED_S, _ENDED_STEP_FACTOR * step_p99_s, _ENDED_GAP_FACTOR * progress.longest_gap_s)
        if started
        else progress.timeout_s
    )
    usual_s = max(usual_s, _busy_factor(found) * progress.timeout_s) if found.is_busy else usual_s
    if progress.was_aborted or (timed_out and not by_rows):
        return found

    quiet_s = _quiet_before_s(found, exits, facts.ended_by)
    # What was a hang while the job ran stays one; rows alone miss progress inside a step.
    live_s = _limit_s(found, progress, step_p99_s)
    if len(ranks) + len(finished) < facts.world_size:  # others may never have got as far as the recorder
        return found if not by_rows and quiet_s >= live_s else None

    by_rows_s = max(usual_s, _ENDED_GAP_FACTOR * max(progress.longest_quiet_s))
    return found if quiet_s >= (by_rows_s if by_rows else min(usual_s, live_s)) else None


def _quiet_before_s(found: DetectedHang, exits: Mapping[int, RankExit], by: EndingSignal | None) -> float:
    """Return the seconds without progress until the job was asked to end: what ranks do then is part of their end."""
    if by is None or not by.at_s:
        return found.quiet_s

    after_s = {rank: ended.gone_s - by.at_s for rank, ended in exits.items() if ended.gone_s is not None}
    return min(each.quiet_s - max(after_s.get(rank, 0.0), 0.0) for rank, each in found.snapshots.items())


def _has_raised(ended: RankExit | None, blamed: Blame) -> bool:
    """Whether an exception of its own ended a rank: no signal, nor a collective in which it was."""
    if ended is None or not ended.exception or ended.rank in blamed.waits:
        return False

    return not (ended.interrupted or ended.stopped or ended.reached_time_limit)


def _has_continued(snapshot: RankSnapshot, ended: RankExit | None) -> bool:
    """Return whether an exception shows that a process without others continued after the last look: another line."""
    line = user_line(snapshot)
    if ended is None or line is None or not ended.exception or ended.interrupted:
        return False

    return ended.line is not None and (ended.file, ended.line) != (line.file, line.line)


def _with_exit(snapshot: RankSnapshot, ended: RankExit | None) -> RankSnapshot:
    """Add what the end of a rank shows: its open phase, and the line that Ctrl-C has interrupted."""
    if ended is None:
        return snapshot

    line = snapshot.user_line
    if line is None and ended.interrupted and ended.file and ended.line:
        line = FrameSnapshot(file=ended.file, line=ended.line, function=ended.function or "<module>", is_user=True)

    return replace(snapshot, phase=snapshot.phase or ended.open_phase or "", user_line=line)
