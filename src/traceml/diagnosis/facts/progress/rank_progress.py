"""Progress of each rank by its rows, and snapshots of ranks that make none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_PHASES, LINE_THREADS, Phase
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, RankSnapshot, user_line
from traceml.database.snapshots.snapshot_timing import first_snapshot_s
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.progress.step_sequences import DivergedRanks, StepSequences
from traceml.formatting import parsed_place

__all__ = ["JobProgress", "ProgressHistory", "RankProgress"]

_DEFAULT_TIMEOUT_S = 60.0  # `hang_timeout` of a job whose ranks did not report theirs
_NS_PER_S = 1e9
# An exception that ends a rank moves its stack first: what it did until then is how it hung. The end of a process takes
# seconds where exit handlers wait for devices, or where it lacks a core.
_DYING_S = 10.0
_CYCLE_S = 1.5  # the next cycle of the recorder takes a snapshot that is due
_SENDING_S = 5.0  # a recorder whose last row is older may not have run
_FIRST_RANKS = 16
_FOREVER_S = 1e9
_CHANGES = 2
_ALIVE = ("R", "S", "D")
_ITSELF = "recorder"  # a snapshot that the rank took; where it could not, another process did
_NO_PROGRESS = (  # a rank without progress sends these too
    InfoKind.SNAPSHOT, InfoKind.SAMPLER, InfoKind.EVALUATING, InfoKind.WORKER_SAMPLES, InfoKind.GPU_HEALTH,
)  # fmt: skip


class RankProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A rank and its progress until now, or until its end."""

    rank: int
    # the newest one since its last progress; None while it makes progress, or where there is none
    snapshot: RankSnapshot | None
    quiet_s: float  # seconds since its last progress, by that snapshot or else by its rows
    alive_s: float  # seconds since its recorder sent anything, by the clock of its host
    step: int  # last step that ended, -1 before the first
    is_unsteady: bool = False  # whether it alternates between running and sleeping: a loop, which may be work
    # last step of a rank whose launched function or script is over: it waits for the others; else None
    returned_at: int | None = None
    ran_script: bool = False  # whether that was a script


class JobProgress(msgspec.Struct, frozen=True):
    """Progress of all ranks."""

    ranks: Mapping[int, RankProgress] = {}  # by rank, those that have sent anything
    timeout_s: float = _DEFAULT_TIMEOUT_S
    # longest pause of any rank that ended with progress: before the first step, and after it
    longest_quiet_s: tuple[float, float] = (0.0, 0.0)
    longest_gap_s: float = 0.0  # longest time from the end of a step to the end of the next
    was_aborted: bool = False  # whether the job was found to hang, and ended for that
    # rank -> its snapshot in the longest pause in a step, which may have ended with progress
    longest_pauses: Mapping[int, RankSnapshot] = {}
    # ranks that have called more collectives than others, and since when; None if all agree
    diverged: DivergedRanks | None = None


class _RankActivity(msgspec.Struct):
    """Rows of the process of a rank beside its steps; times are those of its host's monotonic clock."""

    seen_ns: int | None = None  # newest timestamp of any row
    progress_ns: int = 0  # newest timestamp of a row of `info` that shows progress
    # when it began to end, which may hang too: what it reports since is about earlier steps, and no progress
    ends_ns: int | None = None
    end: RankExit | None = None  # how its script has ended
    cpu: tuple[int, int, float | None] | None = None  # timestamp, CPU time, cores since the row before
    awake_ns: int | None = None  # since when its recorder has taken samples without a pause
    open_step: int = -1
    line: tuple[int, int, int] = (0, 0, -1)  # timestamp, phase, id of the line
    outside_ns: int = 0  # newest timestamp of a line between steps
    evaluating_ns: int = 0  # begin of the newest long evaluation
    snapshot: RankSnapshot | None = None
    longest: RankSnapshot | None = None  # newest one of the longest pause in a step
    own: RankSnapshot | None = None  # newest one that the rank itself took, in a pause that is not over
    over_ns: int | None = None  # end of the pause that the snapshot is about
    changes: int = 0  # of the process's state from snapshot to snapshot, in the same pause
    # last step of a rank whose launched function or script is over, and whether it was a script
    returned: tuple[int | None, bool] = (None, False)

    @property
    def current(self) -> RankSnapshot | None:
        """The newest snapshot; None if there has been progress since."""
        return self.snapshot if self.over_ns is None else None

    def saw(self, t_ns: int) -> None:
        """Note the timestamp of a row."""
        self.seen_ns = max(self.seen_ns or 0, t_ns)


class ProgressHistory:
    """Collects rows and snapshots as they arrive."""

    def __init__(self) -> None:
        self.timeout_s = _DEFAULT_TIMEOUT_S
        self.aborts = False  # whether a job that hangs is to be ended (`on_hang`)
        self.was_aborted = False  # whether the job was found to hang, and ended for that (`rank_snapshot.ABORT`)
        self.has_snapshots = False  # whether any rank makes no progress now, by its snapshots
        self._steps = np.full(_FIRST_RANKS, -1, np.int64)
        self._ends = np.zeros(_FIRST_RANKS, np.int64)  # of the last step or evaluation
        self._gap_ns = 0
        self._newest_gaps = np.zeros(_FIRST_RANKS, np.int64)
        self._step_sequences = StepSequences()
        self._activity: defaultdict[int, _RankActivity] = defaultdict(_RankActivity)
        self._quiet = [0.0, 0.0]

    def snapshot_of(self, rank: int) -> RankSnapshot | None:
        """Return the newest snapshot of a rank without progress; None if it makes progress."""
        return self._activity[rank].current if rank in self._activity else None

    def steps(self, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take step rows of any ranks; those of one rank in order."""
        if not len(rows):
            return

        self._grow(int(ranks.max()) + 1)
        begins = np.diff(ranks, prepend=-1) != 0
        ends, steps = rows["t_end_ns"], rows["step"]
        before, numbers = np.roll(ends, 1), np.roll(steps, 1)
        before[begins], numbers[begins] = self._ends[ranks[begins]], self._steps[ranks[begins]]
        next_one = (steps == numbers + 1) & (before > 0) & (numbers >= 0)
        gaps = np.where(next_one, ends - before, 0)
        # The newest step of a rank may have been closed by the end of the process: it is no measure yet.
        newest = np.append(begins[1:], True)
        earlier = [int(gaps[~newest].max(initial=0)), int(self._newest_gaps[ranks[begins]].max(initial=0))]
        self._gap_ns = max(self._gap_ns, *earlier)
        self._newest_gaps[ranks[newest]] = gaps[newest]
        # numpy keeps the last of equal indices, which is the newest row of the rank
        self._steps[ranks], self._ends[ranks] = steps, ends
        self._step_sequences.add(ranks, rows)

    def eval_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.EVALS`."""
        if len(rows):
            self._grow(rank + 1)
            self._ends[rank] = max(int(self._ends[rank]), int(rows["t_end_ns"].max()))

    def process_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.PROCESS`, in order."""
        if not len(rows):
            return

        activity, times = self._activity[rank], rows["t_ns"]
        pauses = np.flatnonzero(np.diff(times, prepend=activity.cpu[0] if activity.cpu else 0) > _SENDING_S * _NS_PER_S)
        if len(pauses):
            activity.awake_ns = int(times[pauses[-1]])

        for t_ns, step, cpu_ns in rows[["t_ns", "step", "cpu_ns"]][-2:].tolist():
            t_before, cpu_before, share = activity.cpu or (t_ns, cpu_ns, None)
            if t_ns > t_before:
                share = (cpu_ns - cpu_before) / (t_ns - t_before)

            activity.cpu, activity.open_step = (t_ns, cpu_ns, share), step
            activity.saw(t_ns)

    def open_part(self, rank: int) -> str | None:
        """Return the part of the run's time that a rank is in since its last row: `steps`, `checkpoint`, `evaluation`.

        None without progress for `hang_timeout`, and where no sample of its line came since then, or one between steps
        in a short evaluation or none.
        """
        activity = self._activity.get(rank)
        if activity is None:
            return None

        ended_ns = int(self._ends[rank]) if rank < len(self._ends) else 0
        if activity.current is not None and (activity.seen_ns or 0) - ended_ns > self.timeout_s * _NS_PER_S:
            return None

        if activity.evaluating_ns > ended_ns:
            return "evaluation"

        at_ns, phase, _ = activity.line
        if at_ns <= ended_ns or activity.outside_ns > ended_ns:
            return None
        if phase == Phase.CHECKPOINT:
            return "checkpoint"

        return "steps" if phase >= LINE_OTHER and activity.open_step >= 0 else None

    def line_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LINES`; of the newest ones the line that was seen most."""
        rows = rows[rows["phase"] > LINE_THREADS]
        if len(rows):
            newest = rows[rows["t_ns"] == rows["t_ns"].max()]
            row = newest[newest["samples"].argmax()]
            self._activity[rank].line = int(row["t_ns"]), int(row["phase"]), int(row["line_id"])

        outside = rows[rows["phase"] == LINE_OUTSIDE]
        if len(outside):
            self._activity[rank].outside_ns = int(outside["t_ns"].max())

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row of the `info` log."""
        kind, t_ns = row.get("kind"), row.get("t_ns")
        if kind == InfoKind.PROCESS:
            timeout_s = row.get("hang_timeout_s")
            self.timeout_s = float(timeout_s) if isinstance(timeout_s, int | float) else self.timeout_s
            self.aborts = row.get("on_hang") == "abort"

        if kind == InfoKind.RETURNED:
            last_step = row.get("last_step")
            self._activity[rank].returned = last_step if isinstance(last_step, int) else -1, row.get("script") is True

        if kind == InfoKind.EVALUATING and isinstance(row.get("since_ns"), int):
            self._activity[rank].evaluating_ns = row["since_ns"]

        if kind == InfoKind.SNAPSHOT:
            self.take_snapshot(RankSnapshot.from_row({**row, "rank": rank}))
        elif kind == InfoKind.EXIT:
            self._activity[rank].ends_ns = t_ns if isinstance(t_ns, int) else 0
            self._activity[rank].end = RankExit.from_facts(rank, "failed", row)
        elif isinstance(t_ns, int) and kind not in _NO_PROGRESS and self._activity[rank].ends_ns is None:
            self._activity[rank].progress_ns = max(self._activity[rank].progress_ns, t_ns)

        if isinstance(t_ns, int):
            self._activity[rank].saw(t_ns)

    def take_snapshot(self, snapshot: RankSnapshot) -> None:
        """Add a snapshot. One older than the newest only counts as a pause: readers get events after rows."""
        activity = self._activity[snapshot.rank]
        activity.saw(snapshot.at_ns)
        is_longer = activity.longest is None or snapshot.quiet_s > activity.longest.quiet_s
        if snapshot.in_step and not snapshot.ended and is_longer and user_line(snapshot) is not None:
            activity.longest = snapshot

        newest_ns = activity.snapshot.at_ns if activity.snapshot is not None else 0
        if snapshot.at_ns < max(newest_ns, activity.over_ns or 0):
            self._count_pause(snapshot, 0.0)
        elif not snapshot.ended:
            before = activity.current
            if snapshot.is_last and before is not None and _tells_no_more(snapshot, before):
                # The signal that ends a rank has woken it: what it did until then is how it hung.
                quiet_s = snapshot.quiet_s if snapshot.answered == _ITSELF else _continued_s(before, snapshot)
                snapshot = replace(before, at_ns=snapshot.at_ns, quiet_s=quiet_s, is_last=True)

            if before is not None and _lacks_a_core(snapshot, before):
                snapshot = replace(before, at_ns=snapshot.at_ns, quiet_s=_continued_s(before, snapshot))

            activity.changes = 0 if before is None else activity.changes + (_state(before) != _state(snapshot))
            activity.snapshot, activity.over_ns = snapshot, None
            if snapshot.answered == _ITSELF:
                activity.own = snapshot
        elif snapshot.answered != _ITSELF and activity.own is not None and activity.own.step == snapshot.step:
            activity.snapshot = activity.own  # only its recorder was silent: what that saw last still stands
        elif activity.snapshot is not None:
            activity.own, activity.over_ns = None, snapshot.at_ns
            if not activity.snapshot.is_last:
                self._count_pause(snapshot, activity.snapshot.quiet_s)

        self._check_snapshots()

    def _count_pause(self, snapshot: RankSnapshot, quiet_s: float) -> None:
        if snapshot.ended:
            in_training = snapshot.step >= 0
            self._quiet[in_training] = max(self._quiet[in_training], snapshot.quiet_s, quiet_s)

    def forget(self, rank: int) -> None:
        """Forget a rank, of which another process has joined."""
        self.was_aborted = False
        self._activity.pop(rank, None)
        self._step_sequences.forget()
        if rank < len(self._steps):
            self._steps[rank], self._ends[rank], self._newest_gaps[rank] = -1, 0, 0

        self._check_snapshots()

    @property
    def micro_batches(self) -> float:
        """Batches of a step, as gradients are accumulated; at least 1."""
        return self._step_sequences.micro_batches

    def build(
        self,
        hosts: Mapping[int, str],
        names: Mapping[int, Mapping[int, str]],
        ended: Mapping[int, float | None] | None = None,
        opened: Mapping[int, tuple[int, float]] | None = None,
    ) -> JobProgress:
        """Return the progress of each rank until now.

        Args:
            hosts: rank -> host; the ranks of one host have one clock.
            ended: epoch seconds at which ranks have ended, None if unknown: their time does not advance.
            opened: number and age in seconds of the step that was open at the end of a rank.
        """
        gone, open_steps = ended or {}, opened or {}
        now_ns: dict[str | None, int] = {}
        seen = {
            rank: activity.seen_ns for rank, activity in sorted(self._activity.items()) if activity.seen_ns is not None
        }
        for rank, seen_ns in seen.items():
            now_ns[hosts.get(rank)] = max(now_ns.get(hosts.get(rank), 0), seen_ns)

        ranks = {}
        for rank, seen_ns in seen.items():
            at_ns = now_ns[hosts.get(rank)]
            if rank in gone:
                at_ns = max(seen_ns, at_ns - int(_earlier_s(rank, gone, hosts) * _NS_PER_S))

            ranks[rank] = self._of_rank(rank, at_ns, names.get(rank, {}), open_steps.get(rank), is_gone=rank in gone)

        quiet, diverged = (self._quiet[0], self._quiet[1]), self._step_sequences.diverged
        longest = {rank: activity.longest for rank, activity in self._activity.items() if activity.longest is not None}
        return JobProgress(ranks, self.timeout_s, quiet, self._gap_ns / _NS_PER_S, self.was_aborted, longest, diverged)

    def _of_rank(
        self, rank: int, now_ns: int, names: Mapping[int, str], opened: tuple[int, float] | None, *, is_gone: bool
    ) -> RankProgress:
        ends = int(self._ends[rank]) if rank < len(self._ends) else 0
        step = int(self._steps[rank]) if rank < len(self._steps) else -1
        activity = self._activity[rank]
        progress_ns = max(ends, activity.progress_ns)  # 0 without any, as before a rank has connected
        last_ns = progress_ns or now_ns
        open_s = opened[1] if opened is not None else 0.0
        if opened is not None and step >= opened[0]:  # the end of the process has closed that step
            step, last_ns = opened[0] - 1, (activity.ends_ns or now_ns) - int(open_s * _NS_PER_S)
            progress_ns = last_ns

        alive_s = (now_ns - (activity.seen_ns or 0)) / _NS_PER_S
        snapshot, over_ns = activity.snapshot, activity.over_ns
        if snapshot is not None and over_ns is not None:
            # What it did after the job was asked to end, such as to print an error, is part of its end, too.
            is_dying = is_gone and (snapshot.is_last or now_ns - over_ns < _DYING_S * _NS_PER_S)
            snapshot = snapshot if is_dying or self.was_aborted else None

        # The end of one rank lets others continue: an error ends their collective, and with it the wait for its thread.
        is_freed = self.was_aborted and snapshot is not None and progress_ns > snapshot.at_ns
        if snapshot is not None and (is_freed or progress_ns <= snapshot.at_ns):
            until_ns = min(over_ns or now_ns, progress_ns) if is_freed else over_ns or now_ns
            quiet_s = snapshot.quiet_s + max(until_ns - snapshot.at_ns, 0) / _NS_PER_S
            snapshot = replace(snapshot, quiet_s=quiet_s, seen_line=_frame(names.get(snapshot.line_id)))
            snapshot = _with_failure(snapshot, activity.end)
        else:
            quiet_s = max((now_ns - last_ns) / _NS_PER_S, open_s)
            if over_ns is not None and alive_s < _SENDING_S:
                quiet_s = min(quiet_s, self._unseen_s(), (now_ns - over_ns) / _NS_PER_S)
            elif activity.awake_ns is not None and now_ns - activity.awake_ns > self._unseen_s() * _NS_PER_S:
                quiet_s = min(quiet_s, self._unseen_s())

            snapshot = self._from_rows(rank, now_ns, quiet_s, step, names, is_open=open_s > 0) if is_gone else None

        returned_at, ran_script = activity.returned
        return RankProgress(
            rank=rank,
            snapshot=snapshot,
            quiet_s=quiet_s,
            alive_s=alive_s,
            step=step,
            is_unsteady=activity.changes >= _CHANGES,
            returned_at=returned_at,
            ran_script=ran_script,
        )

    def _unseen_s(self) -> float:
        """Return how long a recorder that runs may make no progress without a snapshot."""
        return first_snapshot_s(max(self._quiet), self.timeout_s) + _CYCLE_S

    def _from_rows(
        self, rank: int, now_ns: int, quiet_s: float, step: int, names: Mapping[int, str], *, is_open: bool
    ) -> RankSnapshot:
        """Return what the rows show of a rank that has ended, and has no snapshot."""
        activity, last_ns = self._activity[rank], now_ns - int(quiet_s * _NS_PER_S)
        t_ns, phase, line = activity.line
        return RankSnapshot(
            at_ns=now_ns,
            rank=rank,
            quiet_s=quiet_s,
            step=max(activity.open_step, step),
            in_step=activity.open_step > step or is_open,
            answered="rows",
            phase=LINE_PHASES.get(phase, "other") if t_ns > last_ns else "",
            user_line=_frame(names.get(line)) if t_ns > last_ns else None,
            cpu_share=activity.cpu[2] if activity.cpu else None,
        )

    def _check_snapshots(self) -> None:
        self.has_snapshots = any(activity.current is not None for activity in self._activity.values())

    def _grow(self, ranks: int) -> None:
        if ranks <= len(self._steps):
            return

        more = max(ranks, 2 * len(self._steps)) - len(self._steps)
        self._steps = np.append(self._steps, np.full(more, -1, np.int64))
        self._ends = np.append(self._ends, np.zeros(more, np.int64))
        self._newest_gaps = np.append(self._newest_gaps, np.zeros(more, np.int64))


def _tells_no_more(last: RankSnapshot, before: RankSnapshot) -> bool:
    """Whether a snapshot at the end of a job knows the same as the one before, or only that the process is alive."""
    return last.answered == before.answered or (last.answered == "kernel" and last.process_state in _ALIVE)


def _lacks_a_core(snapshot: RankSnapshot, before: RankSnapshot) -> bool:
    """Whether a snapshot from another process shows a rank that only waited for a core for a moment.

    So it is if the rank polls, or if it sleeps where its own snapshot before saw it.
    """
    sleeps_on = before.answered == _ITSELF and _place(snapshot) == _place(before)
    is_known = before.is_polling or sleeps_on
    return is_known and snapshot.answered == "kernel" and snapshot.process_state in _ALIVE


def _continued_s(before: RankSnapshot, snapshot: RankSnapshot) -> float:
    """Return the seconds without progress at a snapshot from outside, which tells how long the recorder was silent."""
    return max(snapshot.quiet_s, before.quiet_s + (snapshot.at_ns - before.at_ns) / _NS_PER_S)


def _place(snapshot: RankSnapshot) -> tuple[int, bool, str, str]:
    return snapshot.step, snapshot.in_step, snapshot.phase, snapshot.process_state


def _state(snapshot: RankSnapshot) -> tuple[bool, str]:
    """Return whether the rank holds the GIL in one call of C; else the state of its process, unless that is chance."""
    is_held = snapshot.answered == "signal"
    return is_held, "" if is_held or snapshot.is_polling else snapshot.process_state


def _with_failure(snapshot: RankSnapshot, ended: RankExit | None) -> RankSnapshot:
    """Add the exception that has ended the script of a process that does not end."""
    if ended is None or snapshot.phase != "exit" or snapshot.handled or not ended.exception or ended.interrupted:
        return snapshot

    line = FrameSnapshot(file=ended.file or "", line=ended.line or 0, function=ended.function or "")
    return replace(snapshot, handled=ended.exception, raised_line=line if line.file else None)


def _earlier_s(rank: int, ended: Mapping[int, float | None], hosts: Mapping[int, str]) -> float:
    """Return the seconds by which a rank ended before the last one of its host; infinite if unknown.

    A silent rank sends nothing before its end: its last row does not show when that was.
    """
    at_s = ended[rank]
    ends = [each for other, each in ended.items() if each is not None and hosts.get(other) == hosts.get(rank)]
    return _FOREVER_S if at_s is None else max(ends) - at_s


def _frame(text: str | None) -> FrameSnapshot | None:
    """Return the frame of `FILE:LINE FUNCTION`."""
    file, line, function = parsed_place(text)
    if file is None or line is None or function is None:
        return None

    return FrameSnapshot(file=file, line=line, function=function, is_user=True)
