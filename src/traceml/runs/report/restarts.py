"""Restarts of a run's job: the ranks that ended each earlier attempt, and the time that passed until steps went on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.diagnosis.deaths.lost_ranks import root_causes
from traceml.diagnosis.facts.job_facts import RankExit, ended_badly
from traceml.process_ends import signal_name
from traceml.runs.report.report_types import RestartSection
from traceml.runs.report.wall_time import checkpoints, resumes_at
from traceml.runs.rows.clocks import RunClocks

__all__ = ["restarts", "stood_s"]

_STOOD_S = 10.0  # a step that was open for so long on all ranks, when an earlier attempt was ended, had hung
_MOST_RANKS = 8  # of an attempt, whose first and last steps are read


def restarts(reader: StoreReader) -> list[RestartSection]:
    """Return the attempts that ended badly before the last one, the first one first.

    Raises:
        StoreError: the store is damaged.
    """
    attempts: dict[int, list[StreamRecord]] = {}
    for stream in reader.streams():
        if not stream.facts.get("helps"):
            attempts.setdefault(stream.attempt, []).append(stream)

    ordered = sorted(attempts.items())
    found = []
    for (attempt, streams), (_, following) in pairwise(ordered):
        if causes := _causes(streams):
            died = next(stream for stream in streams if stream.rank == causes[0].rank)
            before = resumes_at(died, checkpoints(streams))
            found.append(_section(attempt, causes, _lost_s(reader, streams, following), before))

    return found


def _causes(streams: Sequence[StreamRecord]) -> list[RankExit]:
    newest = {stream.rank: stream for stream in streams}.values()
    exits = [RankExit.from_facts(each.rank, each.state, each.facts.get("exit", {}), each.host) for each in newest]
    return root_causes(ended_badly(exits))


def stood_s(reader: StoreReader, *, hung: bool) -> float:
    """Return the time for which attempts stood still before they were ended, in seconds.

    Args:
        reader: of the run.
        hung: whether the last attempt has hung.
    """
    opened: dict[int, list[float]] = {}
    for stream in reader.streams():
        if not stream.facts.get("helps"):
            opened.setdefault(stream.attempt, []).append(float(stream.facts.get("exit", {}).get("open_s") or 0.0))

    last = max(opened, default=0)
    each = {attempt: min(ages) for attempt, ages in opened.items()}
    return sum(age for attempt, age in each.items() if (hung if attempt == last else age >= _STOOD_S))


def _section(attempt: int, causes: Sequence[RankExit], lost_s: float | None, before: int) -> RestartSection:
    first = causes[0]
    return RestartSection(
        attempt=attempt,
        ranks=sorted(each.rank for each in causes),
        reason=_reason(first),
        step=None if first.step is None else first.step + before,
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
    before = [(stream, ns) for stream in streams[:_MOST_RANKS] if (ns := _last_ns(reader, stream)) is not None]
    after = [(stream, ns) for stream in following[:_MOST_RANKS] if (ns := _first_ns(reader, stream)) is not None]
    if not before or not after:
        return None

    clocks = RunClocks([*streams, *following])
    one, other = before[0][0], after[0][0]
    if one.facts.get("boot_id") and one.facts.get("boot_id") == other.facts.get("boot_id"):
        ended = max(ns for stream, ns in before if stream.facts.get("boot_id") == one.facts["boot_id"])
        begun = min(ns for stream, ns in after if stream.facts.get("boot_id") == one.facts["boot_id"])
    else:
        ended = max(clocks.of_stamp(stream.id, ns) for stream, ns in before)
        begun = min(clocks.of_stamp(stream.id, ns) for stream, ns in after)

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
