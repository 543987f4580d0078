"""Comparison of two runs: what became slower, by how much, and whether the difference is significant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import INFO
from traceml.database.store.reader import StoreReader
from traceml.database.store.store_file import STORE_NAME
from traceml.diagnosis.findings import significant
from traceml.runs.comparison.comparison_types import (
    Comparison,
    MemoryChange,
    MemoryChanges,
    PhaseChange,
    RankChange,
    RunSide,
    StatisticChange,
    StepTimeChanges,
    VerdictChange,
)
from traceml.runs.comparison.significance import Difference, difference
from traceml.runs.report.report import full_report
from traceml.runs.report.report_types import Report, read_report
from traceml.runs.rows.digest import Digest, read_digest

__all__ = ["compare_runs"]

_MS = 1e6
# A smaller change counts as none, significant or not.
_WORTH = 0.005
# A machine is busy when ranks wait for a CPU core more than this share of the time.
_BUSY = 0.10
_MODEL_FACTS = ("model", "parameters", "dtype", "device", "parallel", "compiled")


@dataclass(frozen=True, slots=True)
class _ComparedRun:
    """One of the two runs: its report, its step times in order, and other facts.

    Attributes:
        core_wait: share of time that ranks waited for a CPU core; None where it was not sampled.
        is_file: whether only its report is there, which has no times of single steps.
    """

    report: Report
    times_ms: NDArray[Any]
    model: dict[str, Any]
    batch_size: Any
    core_wait: float | None
    is_file: bool = False


def compare_runs(a: Path, b: Path) -> Comparison:
    """Return the differences from run A to run B (`traceml.compare/1`, see docs/report.md).

    Args:
        a: folder of the run that is compared with, or its `report.json` without a folder.
        b: the other run, likewise.

    Raises:
        StoreError: a store or a report cannot be read.
    """
    first, second = _side(Path(a)), _side(Path(b))
    obstacles = _obstacles(first, second)
    times = StepTimeChanges(**{name: _time(first, second, name, test=not obstacles) for name in _STATISTICS})
    outcome = _outcome(times.mean)
    return Comparison(
        a=_about(first),
        b=_about(second),
        outcome=outcome,
        comparable=not obstacles and outcome != "unknown",
        obstacles=obstacles,
        remarks=_differences(first, second),
        step_time=times,
        phases=_phases(first, second),
        ranks=_ranks(first, second),
        memory=MemoryChanges(
            rss_peak_bytes=_peaks(first, second, "rss_peak_bytes"),
            cuda_peak_bytes=_peaks(first, second, "cuda_peak_bytes"),
        ),
        verdict=_verdicts(first, second),
    )


def _side(path: Path) -> _ComparedRun:
    if path.is_file():
        return _ComparedRun(read_report(path), np.empty(0), {}, None, None, is_file=True)

    return _side_of_store(path)


def _side_of_store(run_dir: Path) -> _ComparedRun:
    with closing(StoreReader(run_dir / STORE_NAME)) as reader:
        digest = read_digest(reader)
        report = full_report(digest, reader, run_dir)
        window = digest.whole_window()
        model, batch_size = _facts(reader)
        core_wait = _core_wait(digest)

    # The mean over ranks, as they wait for each other.
    times = window.total.mean(axis=0, dtype=np.float64) / _MS if window.total.size else np.empty(0)
    return _ComparedRun(report, times, model, batch_size, core_wait)


def _core_wait(digest: Digest) -> float | None:
    facts = digest.facts.build()
    return facts.wait_share if facts.main_wait else None


def _facts(reader: StoreReader) -> tuple[dict[str, Any], Any]:
    model: dict[str, Any] = {}
    batch_size = None
    for _, row in reader.log_rows(INFO.name):
        if row.get("kind") == "model" and not model:
            model = {name: row.get(name) for name in _MODEL_FACTS}
        elif row.get("kind") == "loader" and batch_size is None:
            batch_size = row.get("batch_size")

    return model, batch_size


def _mean(blocks: NDArray[Any]) -> NDArray[Any]:
    means: NDArray[Any] = blocks.mean(axis=1)
    return means


def _quantile(blocks: NDArray[Any], share: float) -> NDArray[Any]:
    found: NDArray[Any] = np.quantile(blocks, share, axis=1)
    return found


_STATISTICS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "mean": _mean,
    "p50": partial(_quantile, share=0.5),
    "p95": partial(_quantile, share=0.95),
    "p99": partial(_quantile, share=0.99),
}


def _time(a: _ComparedRun, b: _ComparedRun, name: str, *, test: bool) -> StatisticChange:
    """Return one statistic of both runs and its change, with its confidence interval if `test`."""
    statistic = _STATISTICS[name]
    values = [_value(side, name) for side in (a, b)]
    if name == "mean":  # of a long run, the mean of all steps is known
        values = [
            side.report.steps.mean_ms if side.report.steps.cut else value
            for side, value in zip((a, b), values, strict=True)
        ]

    found = difference(a.times_ms, b.times_ms, statistic) if test else Difference(None, None, None)
    before = values[0]
    return StatisticChange(
        a_ms=_number(before),
        b_ms=_number(values[1]),
        change=_number(_change(before, values[1])),
        low=_bound(found.low, before),
        high=_bound(found.high, before),
        p=_number(found.p),
        real=None if found.real is None else bool(found.real),
    )


def _value(side: _ComparedRun, name: str) -> float | None:
    """Return a statistic of the compared steps, or the report's where they are not there."""
    if side.is_file:
        found: float | None = getattr(side.report.steps, f"{name}_ms")
        return found

    return float(_STATISTICS[name](side.times_ms[None, :])[0]) if len(side.times_ms) else None


def _bound(bound_ms: float | None, before_ms: float | None) -> float | None:
    """Return a bound of the change as a share; no less than -1, as a step cannot take less than no time."""
    return significant(max(bound_ms / before_ms, -1.0)) if bound_ms is not None and before_ms else None


def _number(value: float | None) -> float | None:
    return None if value is None else significant(value)


def _outcome(mean: StatisticChange) -> Literal["slower", "faster", "same", "unknown"]:
    if mean.real is None or mean.change is None:
        return "unknown"

    if not mean.real or abs(mean.change) < _WORTH:
        return "same"

    return "slower" if mean.change > 0 else "faster"


def _about(side: _ComparedRun) -> RunSide:
    run, steps = side.report.run, side.report.steps
    return RunSide(
        id=run.id,
        name=run.name,
        state=run.state,
        started=run.started,
        duration_s=run.duration_s,
        world_size=run.world_size,
        hosts=run.hosts,
        command=run.command,
        steps=steps.count,
        compared_steps=len(side.times_ms),
        per_second=steps.per_second,
        model=side.model,
        core_wait_share=_number(side.core_wait),
        verdict=side.report.verdict.kind.value,
    )


def _obstacles(a: _ComparedRun, b: _ComparedRun) -> list[str]:
    """Return the reasons why the two cannot be compared."""
    reasons = []
    sizes = [side.report.run.world_size for side in (a, b)]
    if sizes[0] != sizes[1]:
        reasons.append(f"A ran on {sizes[0]} ranks, B on {sizes[1]}: a step is not the same work")

    for name in ("model", "parameters", "dtype", "device"):
        values = [side.model.get(name) for side in (a, b)]
        if None not in values and values[0] != values[1]:
            reasons.append(f"the models differ: {name} {values[0]} in A, {values[1]} in B")

    for side, which in ((a, "A"), (b, "B")):
        if side.is_file:
            reasons.append(f"{which} is a report without its run: chance cannot be told from a change")
        elif not len(side.times_ms):
            reasons.append(f"{which} has no complete steps")

    return reasons


def _differences(a: _ComparedRun, b: _ComparedRun) -> list[str]:
    """Return other differences that matter for the comparison."""
    remarks = []
    pairs = (
        ("batch size", a.batch_size, b.batch_size),
        ("torch.compile", a.model.get("compiled"), b.model.get("compiled")),
        ("parallelism", a.model.get("parallel"), b.model.get("parallel")),
        ("hosts", ", ".join(a.report.run.hosts), ", ".join(b.report.run.hosts)),
    )
    remarks += [
        f"{what}: {_word(before)} in A, {_word(after)} in B"
        for what, before, after in pairs
        if before != after and (what != "batch size" or None not in (before, after))  # not every loader reports it
    ]
    waits = [side.core_wait or 0.0 for side in (a, b)]
    if max(waits) > _BUSY:
        remarks.append(
            f"ranks waited for a CPU core {waits[0]:.0%} of the time in A, {waits[1]:.0%} in B: other programs on the "
            "machine may be the difference"
        )

    for side, which in ((a, "A"), (b, "B")):
        if side.report.run.state != "finished":
            remarks.append(f"{which} is {side.report.run.state}, not finished")

        if side.report.steps.cut and not side.is_file:
            steps = f"{len(side.times_ms):,} of its {side.report.steps.count:,} steps"
            remarks.append(f"{which} is long: {steps}, spread over the run, are compared")

    return remarks


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]

    return str(value)


def _phases(a: _ComparedRun, b: _ComparedRun) -> list[PhaseChange]:
    """Return the phases of both, the largest change first."""
    means = [{phase.phase: phase.mean_ms for phase in side.report.phases} for side in (a, b)]
    changes = []
    for name in dict.fromkeys([*means[0], *means[1]]):
        before, after = means[0].get(name, 0.0), means[1].get(name, 0.0)
        delta = _number(after - before) or 0.0
        changes.append(PhaseChange(phase=name, a_ms=before, b_ms=after, delta_ms=delta))

    return sorted(changes, key=lambda change: -abs(change.delta_ms))


def _ranks(a: _ComparedRun, b: _ComparedRun) -> list[RankChange]:
    """Return the own work per step of each rank, and the phase with the largest change."""
    before, after = (_work_by_rank(side) for side in (a, b))
    return [_rank(rank, before.get(rank), after.get(rank)) for rank in sorted({*before, *after})]


def _rank(rank: int, before: dict[str, float] | None, after: dict[str, float] | None) -> RankChange:
    works = [None if work is None else sum(work.values()) for work in (before, after)]
    change = RankChange(
        rank=rank,
        a_work_ms=_number(works[0]),
        b_work_ms=_number(works[1]),
        change=_number(_change(*works)),
        phase=None,
        phase_delta_ms=None,
    )
    if before is not None and after is not None:
        deltas = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
        change.phase = max(deltas, key=lambda name: abs(deltas[name]))
        change.phase_delta_ms = _number(deltas[change.phase])

    return change


def _work_by_rank(side: _ComparedRun) -> dict[int, dict[str, float]]:
    work: dict[int, dict[str, float]] = {}
    for phase in side.report.phases:
        if phase.phase != "comm":
            for entry in phase.by_rank:
                work.setdefault(entry.rank, {})[phase.phase] = entry.mean_ms

    return work


def _peaks(a: _ComparedRun, b: _ComparedRun, name: str) -> MemoryChange:
    """Return the highest peak over ranks."""
    peaks = [
        max((size for entry in side.report.memory.by_rank if (size := getattr(entry, name))), default=None)
        for side in (a, b)
    ]
    return MemoryChange(a=peaks[0], b=peaks[1], change=_number(_change(peaks[0], peaks[1])))


def _verdicts(a: _ComparedRun, b: _ComparedRun) -> VerdictChange:
    kinds = [[finding.kind.value for finding in side.report.findings] for side in (a, b)]
    return VerdictChange(
        a=kinds[0][0],
        b=kinds[1][0],
        changed=kinds[0][0] != kinds[1][0],
        appeared=[kind for kind in dict.fromkeys(kinds[1]) if kind not in kinds[0]],
        gone=[kind for kind in dict.fromkeys(kinds[0]) if kind not in kinds[1]],
    )


def _change(before: float | None, after: float | None) -> float | None:
    return after / before - 1 if before and after is not None else None
