"""A run as spans for tracing systems: the run, its attempts, and blocks of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report_types import Report
from traceml.runs.report.restarts import attempts_of
from traceml.runs.rows.series import StepSeries, read_series

__all__ = ["RunSpan", "run_spans"]

_S = 1_000_000_000
_MAX_RANKS = 8  # of an attempt, whose last steps are read

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class RunSpan:
    """A span.

    Attributes:
        start_ns, end_ns: epoch nanoseconds.
        key: unique in the run, and the same each time the run is read.
        parent: key of the span around it; None for the run itself.
    """

    name: str
    start_ns: int
    end_ns: int
    key: str
    parent: str | None = None
    attributes: dict[str, Value] = field(default_factory=dict)


def run_spans(run_dir: Path, report: Report) -> list[RunSpan]:
    """Return the spans of an ended run, each after the one around it; none where its start is not known.

    A block of steps is left out where its first or last step is no longer stored.

    Raises:
        StoreError: the store cannot be read.
    """
    run = report.run
    if run.started is None:
        return []

    start_ns = int(run.started * _S)
    end_ns = start_ns + int((run.duration_s or 0.0) * _S)
    root = RunSpan(f"run {run.name}", start_ns, end_ns, "run", None, _facts(report))
    with StoreReader(Path(run_dir) / STORE_NAME) as reader:
        attempts = attempts_of(reader)
        clocks = RunClocks(stream for streams in attempts.values() for stream in streams)
        blocks = _blocks(reader, attempts, clocks, read_series(run_dir).steps)
        return [root, *_attempts(reader, attempts, clocks, root), *blocks]


def _facts(report: Report) -> dict[str, Value]:
    run, steps = report.run, report.steps
    known: dict[str, Value | None] = {
        "traceml.run.id": run.id,
        "traceml.run.name": run.name,
        "traceml.run.project": run.project,
        "traceml.run.state": run.state,
        "traceml.run.world_size": run.world_size,
        "traceml.run.steps": steps.count,
        "traceml.step.mean_seconds": None if steps.mean_ms is None else steps.mean_ms / 1e3,
        "traceml.goodput": None if report.time is None else report.time.goodput,
        "traceml.verdict.kind": report.verdict.kind.value,
        "traceml.verdict.severity": report.verdict.severity.value,
    }
    return {name: value for name, value in known.items() if value is not None}


def _attempts(
    reader: StoreReader, attempts: Mapping[int, Sequence[StreamRecord]], clocks: RunClocks, root: RunSpan
) -> Iterator[RunSpan]:
    for attempt, of_attempt in attempts.items():
        starts = [
            clocks.from_monotonic(stream.id, int(stream.facts["clock"][0]))
            for stream in of_attempt
            if "clock" in stream.facts
        ]
        start_ns = max(min(starts, default=root.start_ns), root.start_ns)
        end_ns = root.end_ns if attempt == max(attempts) else _last_step_ns(reader, of_attempt, clocks)
        facts: dict[str, Value] = {"traceml.attempt": attempt, "traceml.ranks": len({each.rank for each in of_attempt})}
        yield RunSpan(
            f"attempt {attempt}", start_ns, max(end_ns or start_ns, start_ns), f"attempt/{attempt}", "run", facts
        )


def _last_step_ns(reader: StoreReader, streams: Sequence[StreamRecord], clocks: RunClocks) -> int | None:
    last = ((stream.id, reader.last_row(STEPS.name, stream.id)) for stream in streams[:_MAX_RANKS])
    return max(
        (clocks.from_monotonic(each, int(row["t_end_ns"])) for each, row in last if row is not None), default=None
    )


def _blocks(
    reader: StoreReader, attempts: Mapping[int, Sequence[StreamRecord]], clocks: RunClocks, series: StepSeries
) -> Iterator[RunSpan]:
    """Yield the blocks of steps of the charts, as the first rank of the last attempt passed them."""
    if not attempts or not len(series):
        return

    last = max(attempts)
    stream = min(attempts[last], key=lambda each: (each.rank, -each.id))
    newest = reader.last_row(STEPS.name, stream.id)
    if newest is None:
        return

    most = int(newest["step"])
    ends = [(int(first), min(int(first) + series.width - 1, most)) for first in series.steps]
    rows = reader.rows(STEPS.name, [stream.id], steps=[(step, step) for bounds in ends for step in bounds])
    times = {int(row["step"]): (int(row["t_end_ns"]) - int(row["total_ns"]), int(row["t_end_ns"])) for row in rows}
    for index, (first, final) in enumerate(ends):
        if first in times and final in times:
            yield RunSpan(
                f"steps {first}-{final}" if final > first else f"step {first}",
                clocks.from_monotonic(stream.id, times[first][0]),
                clocks.from_monotonic(stream.id, times[final][1]),
                f"steps/{last}/{first}",
                f"attempt/{last}",
                _block_facts(series, index, first, final),
            )


def _block_facts(series: StepSeries, index: int, first: int, final: int) -> dict[str, Value]:
    """Return the durations of a block, in seconds: of all ranks, the same as on the charts."""
    columns = {"step.p50": series.p50_ms, "step.p95": series.p95_ms, "step.max": series.max_ms}
    columns |= {f"phase.{phase}": column for phase, column in series.phases_ms.items()}
    known = {name: float(column[index]) / 1e3 for name, column in columns.items() if np.isfinite(column[index])}
    seconds = {f"traceml.{name}_seconds": value for name, value in known.items()}
    return {"traceml.step.first": first, "traceml.step.last": final, **seconds}
