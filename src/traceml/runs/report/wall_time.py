"""Wall time of a run by part, from the exact sums in its store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from traceml.database.store.reader import StreamRecord
from traceml.database.store.summaries import StepSums
from traceml.diagnosis.facts.run_time import RunTime
from traceml.runs.rows.clocks import RunClocks

__all__ = ["wall_time"]

_S = 1e9


def wall_time(
    records: Sequence[StreamRecord],
    sums: Mapping[int, StepSums],
    ranks: Mapping[int, StreamRecord],
    started_s: float,
    ended_s: float,
) -> RunTime:
    """Return the wall time of a run by part, the mean over ranks.

    Args:
        records: all of its streams.
        sums: the sums of its steps, by stream.
        ranks: newest stream of each rank of the last attempt.
        started_s: start of the run, epoch seconds.
        ended_s: its end, or now.
    """
    clocks = RunClocks(records)
    begin_s = _attempt_start(ranks, clocks, started_s)
    parts = [
        _parts(sums[stream.id], clocks, stream.id, begin_s, ended_s)
        for stream in ranks.values()
        if stream.id in sums and sums[stream.id].count
    ]
    wall_s = max(ended_s - started_s, 0.0)
    known = {part: float(np.mean([each[part] for each in parts])) for part in parts[0]} if parts else {}
    if not parts:
        known["startup"] = ended_s - begin_s

    known["restart"] = begin_s - started_s
    evaluations = max((sums[stream.id].evals.rows for stream in ranks.values() if stream.id in sums), default=0)
    return RunTime.of(wall_s, known, evaluations)


def _attempt_start(ranks: Mapping[int, StreamRecord], clocks: RunClocks, started_s: float) -> float:
    """Return when the last attempt began: with the run, or when the first of its ranks connected."""
    if not any(stream.attempt for stream in ranks.values()):
        return started_s

    pairs = [(stream.id, stream.facts.get("clock")) for stream in ranks.values()]
    dates = [clocks.of_stamp(number, int(pair[0])) / _S for number, pair in pairs if pair and any(pair)]
    return max(min(dates, default=started_s), started_s)


def _parts(sums: StepSums, clocks: RunClocks, stream: int, begin_s: float, ended_s: float) -> dict[str, float]:
    steps, evals = sums.steps.bins, sums.evals.bins
    in_evals = float(evals["ns"].sum()) / _S if len(evals) else 0.0
    first_ns, last_ns = int(steps["begin_ns"].min()), int(steps["end_ns"].max())
    if len(evals):
        first_ns, last_ns = min(first_ns, int(evals["begin_ns"].min())), max(last_ns, int(evals["end_ns"].max()))

    first_batch_s, later_starts_s = _epoch_starts(sums)
    first_s, last_s = (clocks.of_stamp(stream, stamp) / _S for stamp in (first_ns, last_ns))
    in_steps, saving = (float(steps[name].sum()) / _S for name in ("total_ns", "checkpoint_ns"))
    return {
        "startup": first_s - begin_s + first_batch_s,
        "steps": in_steps - saving - first_batch_s - later_starts_s,
        "evaluation": in_evals,
        "checkpoint": saving,
        "between_epochs": last_s - first_s - in_steps - in_evals + later_starts_s,
        "idle": ended_s - last_s,
    }


def _epoch_starts(sums: StepSums) -> tuple[float, float]:
    """Return seconds of waiting for the run's first batch, and for those of later epochs beyond the usual wait."""
    steps, epochs = sums.steps.bins, sums.epochs.bins
    first, later = epochs[epochs["group"] > 0], epochs[epochs["group"] == 0]
    usual_rows = steps["rows"].sum() - epochs["rows"].sum()
    usual_ns = max(steps["input_wait_ns"].sum() - epochs["ns"].sum(), 0) / max(usual_rows, 1)
    # The workers' end and start are no usual wait, also where each step has an iterator of its own.
    worked_ns = later["create_ns"].sum() + later["drain_ns"].sum()
    beyond_ns = later["ns"].sum() - usual_ns * later["rows"].sum() if usual_rows > 0 else 0
    return float(first["ns"].sum()) / _S, float(max(worked_ns, beyond_ns)) / _S
