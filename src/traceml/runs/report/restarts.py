"""Restarts of a job: the ranks that ended each earlier attempt, and when steps continued."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from traceml.database.schema import STEPS
from traceml.database.snapshots.rank_snapshot import ABORT
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.diagnosis.deaths.ended_jobs import end_by_scheduler
from traceml.diagnosis.deaths.lost_ranks import root_causes
from traceml.diagnosis.facts.ends.rank_exit import RankExit, ended_badly
from traceml.diagnosis.facts.wall_time import checkpoints, resumes_at
from traceml.process_ends import signal_name
from traceml.runs.report.report_types import RestartSection

__all__ = ["attempts_of", "newest_exits", "restarts"]

_BY_SCHEDULER = {
    "time_limit": "ended by the scheduler at its time limit",
    "preempted": "preempted by the scheduler",
    "warned": "ended after the scheduler's warning",
    "requeued": "queued again by the scheduler",
}
_MAX_RANKS = 8  # of an attempt, whose first and last steps are read


def restarts(reader: StoreReader) -> list[RestartSection]:
    """Return the attempts that ended badly before the last one, the first one first."""
    found = []
    hung = {event.data.get("attempt") for event in reader.events(kind=ABORT)}
    for (attempt, streams), (_, following) in pairwise(attempts_of(reader).items()):
        # An attempt that was ended as it hung ended at the step of its first rank.
        if ended := _Ended(newest_exits(streams)[0], [], "hung") if attempt in hung else _ended(streams):
            died = next(stream for stream in streams if stream.rank == ended.first.rank)
            before = resumes_at(died, checkpoints(streams))
            found.append(_section(attempt, ended, _lost_s(reader, streams, following), before))

    return found


def attempts_of(reader: StoreReader) -> dict[int, list[StreamRecord]]:
    """Return the streams of ranks by attempt, the first one first."""
    attempts: dict[int, list[StreamRecord]] = {}
    for stream in reader.streams():
        if stream.is_rank:
            attempts.setdefault(stream.attempt, []).append(stream)

    return dict(sorted(attempts.items()))


def newest_exits(streams: Sequence[StreamRecord]) -> list[RankExit]:
    """Return how each rank of an attempt has ended, by its newest process."""
    newest = {stream.rank: stream for stream in streams}.values()
    return [RankExit.from_facts(each.rank, each.state, each.facts.get("exit", {}), each.host) for each in newest]


class _Ended(NamedTuple):
    """A rank of an attempt, all that ended with the cause, and the cause; no ranks if others ended the attempt."""

    first: RankExit
    ranks: list[int]
    reason: str


def _ended(streams: Sequence[StreamRecord]) -> _Ended | None:
    bad = ended_badly(newest_exits(streams))
    causes = root_causes(bad)
    if by_scheduler := end_by_scheduler(bad, causes, None):
        last, cause = by_scheduler
        return _Ended(last, [], _BY_SCHEDULER[cause])

    return _Ended(causes[0], sorted(each.rank for each in causes), _reason(causes[0])) if causes else None


def _section(attempt: int, ended: _Ended, lost_s: float | None, before: int) -> RestartSection:
    return RestartSection(
        attempt=attempt,
        ranks=ended.ranks,
        reason=ended.reason,
        step=None if ended.first.step is None else ended.first.step + before,
        lost_s=lost_s,
    )


def _reason(end: RankExit) -> str:
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
    rows = reader.rows(STEPS.name, [stream.id], last=1)
    if len(rows):
        return int(rows["t_end_ns"][-1])

    clock = stream.facts.get("clock")
    return int(clock[0]) if clock else None


def _first_ns(reader: StoreReader, stream: StreamRecord) -> int | None:
    frame = next(reader.frames(STEPS.name, stream=stream.id, limit=1), None)
    return (
        None
        if frame is None or not frame.n
        else int(np.frombuffer(frame.data, reader.dtype(STEPS.name))["t_end_ns"][0])
    )
