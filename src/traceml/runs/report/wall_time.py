"""Wall time of a run by part, from the exact sums in its store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from traceml.database.store.reader import StreamRecord
from traceml.database.store.summaries import StepSums
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.stopped_time import Stop, without_stops
from traceml.diagnosis.facts.wall_parts import ProcessSums, wall_parts
from traceml.runs.rows.clocks import RunClocks

__all__ = ["wall_time"]

_S = 1e9
_LATE_S = 10.0  # a running rank that was silent for longer has stopped stepping


def wall_time(
    records: Sequence[StreamRecord],
    sums: Mapping[int, StepSums],
    started_s: float,
    ended_s: float,
    *,
    is_running: bool = False,
    stops: Mapping[int, Sequence[Stop]] | None = None,
) -> RunTime:
    """Return the wall time of a run by part, the mean over ranks.

    Args:
        records: all of its streams.
        sums: the sums of its steps, by stream.
        started_s: start of the run, epoch seconds.
        ended_s: its end, or now.
        is_running: whether it runs: then the time up to the last row counts, as rows arrive late.
        stops: times in which each rank did not run.
    """
    clocks = RunClocks(records)
    attempt = max((stream.attempt for stream in records), default=0)
    ranks = _by_rank(records, sums)
    processes = [[_process(sums[stream.id], clocks, stream) for stream in of_rank] for of_rank in ranks] or [[]]
    last_s = max((each.last_ns for of_rank in processes for each in of_rank), default=0) / _S
    if is_running and 0 < ended_s - last_s < _LATE_S:
        ended_s = last_s

    parts = [wall_parts(of_rank, int(started_s * _S), int(ended_s * _S), attempt) for of_rank in processes]
    if stops:
        parts = [
            without_stops(each, stops.get(of_rank[0].rank, ())) for each, of_rank in zip(parts, ranks, strict=False)
        ] or parts

    known = {part: float(np.mean([each[part] for each in parts])) for part in parts[0]}
    time = RunTime.of(max(ended_s - started_s, 0.0), known, _most_evaluations(sums.values()))
    useful_s = [_useful_ns(of_rank, sums) / _S for of_rank in ranks]
    goodput = float(np.mean(useful_s)) / time.wall_s if useful_s and time.wall_s > 0 else 0.0
    return replace(time, goodput=min(goodput, 1.0))


def _by_rank(records: Sequence[StreamRecord], sums: Mapping[int, StepSums]) -> list[list[StreamRecord]]:
    """Return the streams with steps or evaluation of each rank, in the order of the job's attempts."""
    ranks: dict[int, list[StreamRecord]] = {}
    for stream in sorted(records, key=lambda stream: (stream.attempt, stream.id)):
        if stream.id in sums and (sums[stream.id].count or sums[stream.id].evals.rows):
            ranks.setdefault(stream.rank, []).append(stream)

    return list(ranks.values())


def _useful_ns(streams: Sequence[StreamRecord], sums: Mapping[int, StepSums]) -> float:
    """Return the time of a rank's steps without waiting for data, saving, and steps that an attempt repeats."""
    seen, useful_ns = -1, 0.0
    for bins in (sums[stream.id].steps.bins for stream in streams):
        first, last = bins["first_step"], bins["last_step"]
        new = np.clip((last - np.maximum(first - 1, seen)) / (last - first + 1), 0, 1)
        useful_ns += float((new * (bins["total_ns"] - bins["input_wait_ns"] - bins["checkpoint_ns"])).sum())
        seen = max(seen, int(last.max(initial=-1)))

    return useful_ns


def _most_evaluations(sums: Iterable[StepSums]) -> int:
    return max((each.evals.rows for each in sums), default=0)


def _process(sums: StepSums, clocks: RunClocks, stream: StreamRecord) -> ProcessSums:
    steps, evals, epochs = sums.steps.bins, sums.evals.bins, sums.epochs.bins
    begins = [*steps["begin_ns"].tolist(), *evals["begin_ns"].tolist()]
    ends = [*steps["end_ns"].tolist(), *evals["end_ns"].tolist()]
    first, later = epochs[epochs["group"] > 0], epochs[epochs["group"] == 0]
    return ProcessSums(
        attempt=stream.attempt,
        first_ns=clocks.of_stamp(stream.id, min(begins)),
        last_ns=clocks.of_stamp(stream.id, max(ends)),
        steps=sums.count,
        total_ns=int(steps["total_ns"].sum()),
        saving_ns=int(steps["checkpoint_ns"].sum()),
        input_ns=int(steps["input_wait_ns"].sum()),
        evals_ns=int(evals["ns"].sum()),
        epochs=int(later["rows"].sum()),
        epochs_ns=int(later["ns"].sum()),
        restart_ns=int(later["create_ns"].sum() + later["drain_ns"].sum()),
        first_batch_ns=int(first["ns"].sum()),
    )
