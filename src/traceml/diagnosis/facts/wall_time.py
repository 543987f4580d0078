"""Wall time of a run by part, from the exact sums in its store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.schema import Phase
from traceml.database.store.reader import StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.database.store.summaries import StepSums, TableSums
from traceml.diagnosis.facts.ends import RankExit, ended_badly
from traceml.diagnosis.facts.run_time import EvaluationParts, RunTime, UsefulTime, useful_time
from traceml.diagnosis.facts.wall_parts import ProcessSums, Stop, wall_parts, without_stops

__all__ = ["WallTimeFacts", "checkpoints", "resumes_at", "wall_time"]

_S = 1e9
_NEARLY_ALL_STEPS = 0.9
"""Share of the steps of the rank with most of them from which on a rank's rows are all there."""
_EVALUATES_SHARE = 0.5
"""A rank with a smaller share of the longest evaluation does not evaluate: it is a first pass, or a check."""
_SHORT_EVALUATION, _FEW_BATCHES = 0.25, 0.5
"""An evaluation is short that takes less than this share of the longest one, with at most this share of its batches."""
_SEVERAL = 3  # evaluations that show when they come
_COUNTED_SHARE = 0.01
"""Share of the run from which on evaluation and saving of some ranks count as time of all."""
_NOT_PRODUCTIVE = (Phase.INPUT_WAIT.label, Phase.CHECKPOINT.label)
_USUAL_BINS = 4  # with fewer bins of steps it is not known how long they take as a rule
_MIN_SET_UP_NS = 1e9
_LATE_S = 10.0  # a running rank that was silent for longer has stopped stepping


class WallTimeFacts(msgspec.Struct, frozen=True):
    """Facts beside the sums of a run on which its wall time depends."""

    stops: Mapping[int, Sequence[Stop]] = {}  # times in which each rank did not run
    compile_s: Mapping[int, float] = {}  # of each rank in the first steps of the last attempt: that is not training
    early_compile_s: Mapping[int, float] = {}  # seconds of compiling of each rank before the first step
    grouped: bool = False  # whether the ranks wait for each other
    untraced: bool = False  # whether the script only logs
    # of a running run, the part that each rank is in since its last step, where it is known
    open_parts: Mapping[int, str] = {}


def wall_time(
    records: Sequence[StreamRecord],
    sums: Mapping[int, StepSums],
    started_s: float,
    ended_s: float,
    known: WallTimeFacts,
    *,
    is_running: bool = False,
    hung_s: Mapping[int, float] | None = None,
) -> RunTime:
    """Return the wall time of a run by part, the mean over the ranks that determine it.

    Where ranks wait for each other, evaluation or saving on some of them, as on rank 0 alone, is time of the run: the
    mean is over those ranks.

    Args:
        records: all of its streams, or those of some ranks.
        sums: the sums of its steps, by stream.
        started_s: start of the run, epoch seconds.
        ended_s: its end, or now.
        is_running: whether it runs: then the time up to the last row counts, as rows arrive late.
        hung_s: seconds without progress before an attempt was ended, by attempt: no time in a step.
    """
    hung, records = hung_s or {}, [each for each in records if each.is_rank]
    clocks = RunClocks(records)
    attempt = max((stream.attempt for stream in records), default=0)
    ranks = [
        _RankTime(streams, [_process(sums.get(each.id), clocks, each, hung.get(each.attempt, 0.0)) for each in streams])
        for streams in _by_rank(records, sums)
    ]
    if is_running:
        ended_s = _end_so_far(ranks, ended_s)

    bounds_ns = int(started_s * _S), int(ended_s * _S)
    for each in ranks:
        each.opened = _opened(each, known.open_parts, ended_s) if is_running else None
        parts = wall_parts(each.processes, *bounds_ns, attempt, each.opened)
        each.parts = without_stops(parts, known.stops.get(each.rank, ()))

    evaluators, evaluators_s = _evaluators({each.rank: each.parts["evaluation"] for each in ranks})
    counted = _setting_the_time(ranks, _COUNTED_SHARE * (ended_s - started_s)) if known.grouped else ranks
    by_rank = [each.parts for each in counted] or [wall_parts((), *bounds_ns, attempt)]
    spent_s = {part: _mean([each[part] for each in by_rank]) for part in by_rank[0]}
    if not ranks and records and (known.untraced or all(stream.state == "finished" for stream in records)):
        spent_s = dict.fromkeys(spent_s, 0.0)  # what it did was not seen: it is not the start-up of a training

    set_up_s = _mean([each.last.set_up_ns / _S for each in ranks])  # of the first steps: in `begin`, not in `steps`
    compiled_s = min(_mean([known.compile_s.get(each.rank, 0.0) for each in counted]), set_up_s + spent_s["steps"])
    more_s = max(compiled_s - set_up_s, 0.0)  # a long run does not show its first steps alone
    begin = "restart" if attempt > 0 else "startup"  # compiling in the first steps is no training
    spent_s |= {"steps": spent_s["steps"] - more_s, begin: spent_s[begin] + more_s}
    of_ranks = [[sums[each.id].evals for each in rank.streams if each.id in sums] for rank in counted]
    evaluations, short, short_s = max(map(_evaluations, of_ranks), default=(0, 0, 0.0))
    time = RunTime.of(max(ended_s - started_s, 0.0), spent_s, evaluations)
    early_s = min(_mean([*known.early_compile_s.values()]), time.seconds["startup"])
    evaluating_ns = [each.last.last_ns for each in ranks if each.opened == "evaluation"]
    return replace(
        time,
        useful=_useful_time(counted, sums, checkpoints(records), set_up_s + more_s),
        compile_s=compiled_s + early_s,
        set_up_s=set_up_s + more_s,
        first_data_s=_mean([each.last.first_batch_ns / _S for each in ranks]),
        evaluators=evaluators,
        evaluators_s=min(evaluators_s, time.wall_s),
        others_evaluate_s=_mean(
            [each.parts["evaluation"] for each in ranks if evaluators and each.rank not in evaluators]
        ),
        short_evaluations=short,
        short_evaluations_s=short_s,
        evaluating_s=max(ended_s - min(evaluating_ns) / _S, 0.0) if evaluating_ns else 0.0,
        evaluation_parts=_evaluation_parts([each.evals.bins for each in sums.values()]),
        evaluates_before=any(_evaluates_before(each) for each in sums.values()),
        evaluates_only_first=_evaluates_only_first(sums.values()),
    )


class _RankTime(msgspec.Struct):
    """A rank with steps, an open one, or evaluation."""

    streams: list[StreamRecord]  # its streams, in the order of the job's attempts
    processes: list[ProcessSums]  # the sums of each
    opened: str | None = None  # of a running run, the part that it is in since its last row, where that is known
    parts: Mapping[str, float] = {}  # its seconds by part, without those in which it was stopped

    @property
    def rank(self) -> int:
        return self.streams[0].rank

    @property
    def last(self) -> ProcessSums:
        return self.processes[-1]


def _opened(rank: _RankTime, known: Mapping[int, str], ended_s: float) -> str | None:
    """Return the part that a rank is in since its last row: steps, where the next is not late."""
    is_stepping = rank.last.steps > 0 and ended_s - rank.last.last_ns / _S < _LATE_S
    return known.get(rank.rank, "steps" if is_stepping else None)


def _end_so_far(ranks: Iterable[_RankTime], now_s: float) -> float:
    """Return the time of the last row of a running run; now, once its rows are late."""
    last_s = max((each.last_ns for rank in ranks for each in rank.processes), default=0) / _S
    return last_s if 0 < now_s - last_s < _LATE_S else now_s


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _by_rank(records: Sequence[StreamRecord], sums: Mapping[int, StepSums]) -> list[list[StreamRecord]]:
    """Return the streams with steps, an open one, or evaluation of each rank, in the order of the job's attempts."""
    ranks: dict[int, list[StreamRecord]] = {}
    partly = _sent_partly(records, sums)
    for stream in sorted(records, key=lambda stream: (stream.attempt, stream.id)):
        if stream.id in partly:
            continue

        if _has_rows(sums.get(stream.id)) or _open_step(stream) is not None:
            ranks.setdefault(stream.rank, []).append(stream)

    return list(ranks.values())


def _sent_partly(records: Iterable[StreamRecord], sums: Mapping[int, StepSums]) -> set[int]:
    """Return the streams of which the aggregator of their host has sent a part of the steps only."""
    relayed = [each for each in records if each.facts.get("relayed") and each.id in sums]
    most: dict[int, int] = {}
    for each in relayed:
        most[each.attempt] = max(most.get(each.attempt, 0), sums[each.id].count)

    return {each.id for each in relayed if sums[each.id].count < _NEARLY_ALL_STEPS * most[each.attempt]}


def _useful_time(
    ranks: Sequence[_RankTime], sums: Mapping[int, StepSums], saved_steps: Mapping[int, int], set_up_s: float
) -> UsefulTime:
    """Return the useful time of ranks, the mean without set-up in the first steps; of steps, that of the most."""
    by_rank = [
        [
            (bins := sums[each.id].steps.bins, resumes_at(each, saved_steps), _failed_ns(each, bins))
            for each in rank.streams
            if each.id in sums
        ]
        for rank in ranks
    ]
    useful = [useful_time(of_rank) for of_rank in by_rank]
    return UsefulTime(
        max(_mean([each.productive_s for each in useful]) - set_up_s, 0.0),
        max((each.productive_steps for each in useful), default=0),
        _mean([each.repeated_s for each in useful]),
        max((each.repeated_steps for each in useful), default=0),
    )


def _failed_ns(stream: StreamRecord, bins: NDArray[np.void]) -> int:
    """Return the time of the step in which a process failed, perhaps after a hang, if its end has written that row."""
    ended = RankExit.of_stream(stream)
    if not _has_written(ended, bins) or not ended_badly([ended]) or ended.open_phase in _NOT_PRODUCTIVE:
        return 0

    return int((ended.open_s or 0.0) * _S)


def _has_written(ended: RankExit, bins: NDArray[np.void]) -> bool:
    """Whether the end of a process has written the row of the step that was open."""
    return ended.in_step and int(bins["last_step"].max(initial=-1)) == ended.open_step


def resumes_at(stream: StreamRecord, attempts: Mapping[int, int]) -> int:
    """Return the steps in the checkpoint with which a process began: its own, else that of its attempt."""
    return int(stream.facts.get("resumes_at") or attempts.get(stream.attempt, 0))


def checkpoints(records: Sequence[StreamRecord]) -> dict[int, int]:
    """Return the steps in the checkpoint with which each attempt began: one rank may read it for all."""
    found: dict[int, int] = {}
    for stream in records:
        at = int(stream.facts.get("resumes_at", 0))
        found[stream.attempt] = max(at, found.get(stream.attempt, 0))

    return found


def _setting_the_time(ranks: list[_RankTime], least_s: float) -> list[_RankTime]:
    """Return the ranks that evaluate or save for `least_s` where most others do not; else all."""
    busy_s = {index: each.parts["evaluation"] + each.parts["checkpoint"] for index, each in enumerate(ranks)}
    some, seconds = _evaluators(busy_s)
    return [ranks[index] for index in some] if some and seconds >= least_s else ranks


def _evaluators(seconds: Mapping[int, float]) -> tuple[tuple[int, ...], float]:
    """Return the ranks that evaluate where most others do not, and their seconds of it, the mean; none if most do."""
    longest = max(seconds.values(), default=0.0)
    some = tuple(sorted(rank for rank, s in seconds.items() if s > _EVALUATES_SHARE * longest))
    if not some or len(some) > len(seconds) / 2:
        return (), 0.0

    return some, _mean([seconds[rank] for rank in some])


def _evaluations(attempts: Sequence[TableSums]) -> tuple[int, int, float]:
    """Return how many evaluations there were in the attempts of a rank, how many were short, and the seconds of those.

    Short are Lightning's check before the first epoch, and evaluations on some batches next to one of all data. One on
    as many batches as the others, which took longer on a busy host, is one of them.
    """
    rows, ns, batches = (
        np.concatenate([np.empty(0), *(each.bins[name] for each in attempts)]) for name in ("rows", "ns", "batches")
    )
    if not len(rows):
        return 0, 0, 0.0

    means, batches = ns / rows, batches / rows
    short = (means < _SHORT_EVALUATION * means.max()) & (batches <= _FEW_BATCHES * batches.max())
    return int(rows.sum()), int(rows[short].sum()), float(ns[short].sum()) / _S


def _evaluation_parts(evals: Sequence[NDArray[np.void]]) -> EvaluationParts:
    """Return what evaluations spend their time on; nothing for a store of an earlier version, which has no such sums.

    Args:
        evals: their sums in bins, of each process.
    """
    known = [bins for bins in evals if len(bins) and "input_wait_ns" in (bins.dtype.names or ())]
    rows, whole_ns, batches, input_ns, forward_ns = (
        sum(max(float(bins[name].sum()), 0.0) for bins in known)
        for name in ("rows", "ns", "batches", "input_wait_ns", "forward_ns")
    )
    if not (whole_ns and batches):
        return EvaluationParts()

    return EvaluationParts(input_ns / whole_ns, forward_ns / whole_ns, whole_ns / batches, batches / rows)


def _evaluates_before(sums: StepSums) -> bool:
    """Return whether evaluation comes before training steps each time, as where these train on what it gives."""
    evals, steps = sums.evals.bins, sums.steps.bins
    if evals["rows"].sum() < _SEVERAL or not len(steps):
        return False

    return bool(
        evals["first_step"].min() <= steps["first_step"].min() and evals["last_step"].max() <= steps["last_step"].max()
    )


def _evaluates_only_first(sums: Iterable[StepSums]) -> bool:
    """Return whether all evaluation comes before the first training step, as where it computes features for it."""
    both = [each for each in sums if len(each.evals.bins) and len(each.steps.bins)]
    return bool(both) and all(
        each.evals.bins["last_step"].max() <= each.steps.bins["first_step"].min() for each in both
    )


def _has_rows(sums: StepSums | None) -> bool:
    return sums is not None and (sums.count > 0 or sums.evals.rows > 0)


def _open_step(stream: StreamRecord) -> tuple[float, float] | None:
    """Return the begin and the end of the step in which a process ended, by its host's wall clock, or None."""
    ended = RankExit.of_stream(stream)
    if not ended.in_step or ended.at_s is None or ended.open_s is None:
        return None

    return ended.at_s - ended.open_s, ended.at_s


def _process(sums: StepSums | None, clocks: RunClocks, stream: StreamRecord, hung_s: float) -> ProcessSums:
    process = _summed(sums, clocks, stream) if sums is not None and _has_rows(sums) else ProcessSums(stream.attempt)
    if (opened := _open_step(stream)) is not None:
        begin_ns, end_ns = (clocks.from_wall_clock(stream.id, int(at_s * _S)) for at_s in opened)
        has_row = sums is not None and _has_written(RankExit.of_stream(stream), sums.steps.bins)
        process.end_in_step(begin_ns, end_ns, int(hung_s * _S), has_row=has_row)

    return process


def _summed(sums: StepSums, clocks: RunClocks, stream: StreamRecord) -> ProcessSums:
    steps, evals, epochs = sums.steps.bins, sums.evals.bins, sums.epochs.bins
    begins = [*steps["begin_ns"].tolist(), *evals["begin_ns"].tolist()]
    ends = [*steps["end_ns"].tolist(), *evals["end_ns"].tolist()]
    first, later = epochs[epochs["group"] > 0], epochs[epochs["group"] == 0]
    return ProcessSums(
        attempt=stream.attempt,
        first_ns=clocks.from_monotonic(stream.id, min(begins)),
        last_ns=clocks.from_monotonic(stream.id, max(ends)),
        steps=sums.count,
        total_ns=int(steps["total_ns"].sum()),
        saving_ns=int(steps["checkpoint_ns"].sum()),
        input_ns=int(steps["input_wait_ns"].sum()),
        evals_ns=int(evals["ns"].sum()),
        epochs=int(later["rows"].sum()),
        epochs_ns=int(later["ns"].sum()),
        restart_ns=int(later["create_ns"].sum() + later["drain_ns"].sum()),
        first_batch_ns=int(first["ns"].sum()),
        set_up_ns=_set_up_ns(steps),
    )


def _set_up_ns(bins: NDArray[np.void]) -> int:
    """Return the time by which the first steps of a process took longer than the others; 0 if it is short.

    Most of it is in one step: what is imported, built or compiled at the first call. Waiting for data and saving do not
    count.
    """
    if len(bins) < _USUAL_BINS:
        return 0

    spent_ns, rows = bins["total_ns"] - bins["input_wait_ns"] - bins["checkpoint_ns"], bins["rows"]
    means_ns = spent_ns / rows
    usual_ns = max(float(means_ns[1]), float(np.median(means_ns[1:])))
    excess_ns = float(spent_ns[0]) - usual_ns * float(rows[0])
    longest_ns = float(bins["total_ns_max"][0]) - usual_ns
    return int(excess_ns) if excess_ns >= _MIN_SET_UP_NS and longest_ns >= excess_ns / 2 else 0
