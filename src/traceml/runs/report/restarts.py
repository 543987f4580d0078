"""Restarts of a job: the ranks that ended each earlier attempt, when steps continued, and how long it had hung."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import INFO, PROCESS, STEPS
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT, RankSnapshot
from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.diagnosis.deaths.closed_connections import early_ends
from traceml.diagnosis.deaths.ended_jobs import end_by_scheduler
from traceml.diagnosis.deaths.lost_ranks import root_causes
from traceml.diagnosis.deaths.out_of_memory import is_out_of_memory
from traceml.diagnosis.facts.ends import RankExit, ended_badly
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.wall_time import checkpoints, resumes_at
from traceml.diagnosis.hangs.hang_detection import detect_hang
from traceml.process_ends import signal_name
from traceml.runs.report.report_types import RestartSection

__all__ = ["attempts_of", "earlier_hangs_s", "restarts"]

_BY_SCHEDULER = {
    "time_limit": "ended by the scheduler at its time limit",
    "preempted": "preempted by the scheduler",
    "warned": "ended after the scheduler's warning",
    "requeued": "queued again by the scheduler",
    "cancelled": "ended by the scheduler",
}
_MAX_RANKS = 8  # of an attempt, whose first and last steps are read
_STEPS, _SAMPLES = 64, 2  # last rows of each rank that are read


def restarts(reader: StoreReader) -> list[RestartSection]:
    """Return the attempts that ended badly before the last one, the first one first."""
    found = []
    hung = {event.data.get("attempt") for event in reader.events(kind=ABORT)}
    for (attempt, streams), (_, following) in pairwise(attempts_of(reader).items()):
        # An attempt that was ended as it hung ended at the step of its first rank.
        if ended := _Ended(_newest_exits(streams)[0], [], "hung") if attempt in hung else _ended(streams):
            died = next(stream for stream in streams if stream.rank == ended.first.rank)
            step = _last_step(reader, died) if ended.first.step is None else ended.first.step
            section = RestartSection(
                attempt=attempt,
                ranks=ended.ranks,
                reason=ended.reason,
                step=None if step is None else step + resumes_at(died, checkpoints(streams)),
                lost_s=_lost_s(reader, streams, following),
            )
            found.append(section)

    return found


def attempts_of(reader: StoreReader) -> dict[int, list[StreamRecord]]:
    """Return the streams of ranks by attempt, the first one first."""
    attempts: dict[int, list[StreamRecord]] = {}
    for stream in reader.streams():
        if stream.is_rank:
            attempts.setdefault(stream.attempt, []).append(stream)

    return dict(sorted(attempts.items()))


def _newest_exits(streams: Sequence[StreamRecord]) -> list[RankExit]:
    """Return how each rank of an attempt has ended, by its newest process."""
    newest = {stream.rank: stream for stream in streams}.values()
    return [RankExit.of_stream(each) for each in newest]


class _Ended(NamedTuple):
    """A rank of an attempt, all that ended with the cause, and the cause; no ranks if others ended the attempt."""

    first: RankExit
    ranks: list[int]
    reason: str


def _ended(streams: Sequence[StreamRecord]) -> _Ended | None:
    exits = _newest_exits(streams)
    bad = ended_badly(exits)
    causes = root_causes(bad)
    if by_scheduler := end_by_scheduler(bad, causes, None):
        last, cause = by_scheduler
        return _Ended(last, [], _BY_SCHEDULER[cause])

    if bad and all(each.stopped for each in bad):
        return _Ended(bad[0], [], "stopped by the launcher")

    if gone := early_ends(causes, exits):
        return _Ended(causes[0], sorted(each.rank for each in gone), "ended before the others")

    return _Ended(causes[0], sorted(each.rank for each in causes), _reason(causes[0])) if causes else None


def _reason(end: RankExit) -> str:
    if end.oom == "group" or is_out_of_memory(end.exception or ""):
        return "out of memory"

    if end.host_lost:
        return "lost with the host"

    if end.signal is not None:
        return signal_name(end.signal)

    if end.exception:
        return end.exception.partition(":")[0]

    return "lost without a report" if end.code is None else f"exit code {end.code}"


def _lost_s(reader: StoreReader, streams: Sequence[StreamRecord], following: Sequence[StreamRecord]) -> float | None:
    """Return the time from the last step of an attempt, or its start, to the first step of the next one."""
    before = [(stream, ns) for stream in streams[:_MAX_RANKS] if (ns := _last_ns(reader, stream)) is not None]
    after = [(stream, ns) for stream in following[:_MAX_RANKS] if (ns := _first_ns(reader, stream)) is not None]
    if not before or not after:
        return None

    clocks = RunClocks([*streams, *following])
    one, other = before[0][0], after[0][0]
    if one.facts.get("boot_id") and one.facts.get("boot_id") == other.facts.get("boot_id"):
        ended = max(ns for stream, ns in before if stream.facts.get("boot_id") == one.facts["boot_id"])
        begun = min(ns for stream, ns in after if stream.facts.get("boot_id") == one.facts["boot_id"])
    else:
        ended = max(clocks.from_monotonic(stream.id, ns) for stream, ns in before)
        begun = min(clocks.from_monotonic(stream.id, ns) for stream, ns in after)

    return round(max(begun - ended, 0) / 1e9, 3)


def _last_ns(reader: StoreReader, stream: StreamRecord) -> int | None:
    """Return the monotonic end of a stream's last step, or its connection where it has none."""
    row = reader.last_row(STEPS.name, stream.id)
    if row is not None:
        return int(row["t_end_ns"])

    clock = stream.facts.get("clock")
    return int(clock[0]) if clock else None


def _last_step(reader: StoreReader, stream: StreamRecord) -> int | None:
    """Return the last step of a rank that has arrived, of one whose end nobody saw."""
    row = reader.last_row(STEPS.name, stream.id)
    return None if row is None else int(row["step"])


def _first_ns(reader: StoreReader, stream: StreamRecord) -> int | None:
    frame = next(reader.frames(STEPS.name, stream=stream.id, limit=1), None)
    return (
        None
        if frame is None or not frame.n
        else int(np.frombuffer(frame.data, reader.dtype(STEPS.name))["t_end_ns"][0])
    )


def earlier_hangs_s(reader: StoreReader) -> dict[int, float]:
    """Return for how many seconds attempts before the last one made no progress when they were ended, by attempt."""
    *earlier, _ = attempts_of(reader).values() or [[]]
    if not earlier:
        return {}

    world_size = int(reader.meta().get("run", {}).get("world_size", 1))
    attempts = [_EndedAttempt(reader, streams, world_size) for streams in earlier]
    by_stream = {number: attempt for attempt in attempts for number in attempt.rank_of}
    for number, row in reader.log_rows(INFO.name):
        if (attempt := by_stream.get(number)) is not None:
            attempt.facts_builder.info(attempt.rank_of[number], row)

    for event in reader.events(kind=SNAPSHOT):
        for attempt in attempts:
            if event.data.get("stream") in attempt.rank_of or event.data.get("attempt") == attempt.number:
                attempt.facts_builder.progress.take_snapshot(RankSnapshot.from_row(event.data))

    return {attempt.number: attempt.hung_s() for attempt in attempts}


class _EndedAttempt:
    """Rows of an attempt that show whether it had hung when it was ended.

    Args:
        streams: of the ranks of the attempt.

    Attributes:
        rank_of: stream -> rank, of the newest process of each rank.
    """

    def __init__(self, reader: StoreReader, streams: Sequence[StreamRecord], world_size: int) -> None:
        newest = {stream.rank: stream for stream in streams}
        self.number = streams[0].attempt
        self.rank_of = {stream.id: rank for rank, stream in newest.items()}
        self.facts_builder = JobFactsBuilder(world_size)
        self.facts_builder.state = RunStatus.FAILED.value
        for rank, stream in newest.items():
            self.facts_builder.host(rank, stream.host)

        for ended in _newest_exits(streams):
            self.facts_builder.exit(ended)

        samples = self._rows(reader, PROCESS.name, _SAMPLES)
        for number, rank in self.rank_of.items():
            self.facts_builder.process_rows(rank, samples[samples["stream"] == number])

        self._steps = self._rows(reader, STEPS.name, _STEPS)
        ranks = np.array([self.rank_of[number] for number in self._steps["stream"].tolist()], np.int64)
        self.facts_builder.progress.steps(ranks, self._steps)

    def hung_s(self) -> float:
        """Return the time for which it had made no progress when it was ended, in seconds; 0 if it had not hung."""
        p99_s = float(np.quantile(self._steps["total_ns"], 0.99)) / 1e9 if len(self._steps) else 0.0
        found = detect_hang(self.facts_builder.build(), p99_s)
        return 0.0 if found is None else found.quiet_s

    def _rows(self, reader: StoreReader, table: str, last: int) -> NDArray[np.void]:
        """Return the last rows of each rank, by rank."""
        rows = reader.rows(table, list(self.rank_of), last=last)
        return rows[np.argsort(rows["stream"], kind="stable")]
