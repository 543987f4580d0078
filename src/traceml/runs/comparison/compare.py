"""Comparison of two runs: what became slower, by how much, and whether the difference is significant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from traceml.database.states import RunStatus
from traceml.diagnosis.findings import significant
from traceml.formatting import ms_text, name_order, name_without_rank, names_text, part_words, percent_text, plural
from traceml.runs.comparison.compared_run import ComparedRun, read_compared
from traceml.runs.comparison.comparison_types import (
    Comparison,
    MemoryChange,
    MemoryChanges,
    MetricChange,
    ParamChange,
    PhaseChange,
    RankChange,
    RunSide,
    StatisticChange,
    StepTimeChanges,
    VerdictChange,
)
from traceml.runs.comparison.significance import Difference, difference
from traceml.runs.comparison.source_changes import package_changes, source_remarks, variable_changes
from traceml.runs.report.report_types import Report
from traceml.runs.rows.metrics import is_loss

__all__ = ["compare_runs", "compare_sides", "metric_changes", "param_changes"]

# A smaller change counts as none, significant or not.
_WORTH = 0.005
# A machine is busy when ranks wait for a CPU core more than this share of the time.
_BUSY = 0.10
# Phases of at least this share of the step are large; they change alike if each changes by half of what the step does.
_LARGE, _MIN_PHASES, _ALIKE = 0.05, 3, 0.5
# Steps with as many samples as this share more or less are the same work: the last batch of an epoch may be smaller.
_SAME_BATCH = 0.05
_BETWEEN_STEPS = ("evaluation", "between_epochs")
_WITH_STEPS = ("steps", "checkpoint", "between_epochs")


def compare_runs(a: Path, b: Path, letter: str = "B") -> Comparison:
    """Return the differences from run A to run B (`traceml.compare/1`, see docs/report.md).

    Args:
        a: folder of the run that is compared with, or its `report.json` without a folder.
        b: the other run, likewise.
        letter: of the other run, in the notes.

    Raises:
        StoreError: a store or a report cannot be read.
    """
    first = read_compared(Path(a))
    return compare_sides(first, first if Path(a) == Path(b) else read_compared(Path(b)), letter)


def compare_sides(first: ComparedRun, second: ComparedRun, letter: str = "B") -> Comparison:
    """Return the differences from a run that is compared with to another one; a run is the same as itself."""
    obstacles = [] if first is second else _obstacles(first, second, letter)
    times = StepTimeChanges(**{name: _time(first, second, name, test=not obstacles) for name in _STATISTICS})
    samples = _samples(first, second)
    sample_time = _time(first, second, "mean", test=not obstacles, samples=samples) if samples else None
    judged, phases = sample_time or times.mean, _phases(first, second)
    outcome = "same" if first is second else _outcome(judged)
    if outcome in ("slower", "faster") and (alike := _alike(judged, phases, samples or (1.0, 1.0))):
        outcome, obstacles = "unknown", [*obstacles, alike]

    return Comparison(
        a=_about(first),
        b=_about(second),
        outcome=outcome,
        comparable=not obstacles and outcome != "unknown",
        obstacles=obstacles,
        remarks=[*_differences(first, second, letter, samples), *_outside_steps(first, second, letter)],
        step_time=times,
        sample_time=sample_time,
        phases=phases,
        ranks=_ranks(first, second),
        memory=MemoryChanges(
            rss_peak_bytes=_peaks(first, second, "rss_peak_bytes"),
            cuda_peak_bytes=_peaks(first, second, "cuda_peak_bytes"),
        ),
        verdict=_verdicts(first, second),
        metrics=metric_changes(first.report, second.report),
        params=param_changes(first.report, second.report),
        packages=package_changes(first.report, second.report),
        variables=variable_changes(first.report, second.report),
    )


_STATISTICS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "mean": lambda blocks: blocks.mean(axis=1),
    "p50": partial(np.quantile, q=0.5, axis=1),
    "p95": partial(np.quantile, q=0.95, axis=1),
    "p99": partial(np.quantile, q=0.99, axis=1),
}
"""Statistic of step times -> function that returns it for each block, a row."""


def _samples(a: ComparedRun, b: ComparedRun) -> tuple[float, float] | None:
    """Return the samples of a mean step of each run; None if they are the same, or not known."""
    first, second = (side.report.steps.samples_per_step for side in (a, b))
    if not first or not second or abs(np.log(second / first)) < np.log1p(_SAME_BATCH):
        return None

    return first, second


def _time(
    a: ComparedRun, b: ComparedRun, name: str, *, test: bool, samples: tuple[float, float] = (1.0, 1.0)
) -> StatisticChange:
    """Return one statistic of both runs and its change, with its confidence interval if `test`.

    Args:
        samples: numbers by which the step times of each run are divided.
    """
    statistic = _STATISTICS[name]
    values = [_value(side, name) for side in (a, b)]
    if name == "mean":  # of a long run, the mean of all steps is known
        values = [
            side.report.steps.mean_ms if side.report.steps.cut else value
            for side, value in zip((a, b), values, strict=True)
        ]

    values = [None if value is None else value / size for value, size in zip(values, samples, strict=True)]
    a_ms, b_ms = (side.times_ms / size for side, size in zip((a, b), samples, strict=True))
    found = difference(a_ms, b_ms, statistic) if test else Difference(None, None, None)
    change = _change(*values)
    low, high = _interval(found, change)
    return StatisticChange(
        a_ms=significant(values[0]),
        b_ms=significant(values[1]),
        change=significant(change),
        low=significant(low),
        high=significant(high),
        p=significant(found.p),
        real=None if low is None or high is None else bool(found.real) and not low <= 0 <= high,
    )


def _interval(found: Difference, change: float | None) -> tuple[float | None, float | None]:
    """Return the confidence interval, widened to the change: that is of all steps, the interval of whole blocks."""
    if found.low is None or found.high is None or change is None:
        return None, None

    return min(found.low, change), max(found.high, change)


def _value(side: ComparedRun, name: str) -> float | None:
    """Return a statistic of the compared steps, or the report's where it has not all of them."""
    if side.is_file and len(side.times_ms) < side.report.steps.count:
        found: float | None = getattr(side.report.steps, f"{name}_ms")
        return found

    return float(_STATISTICS[name](side.times_ms[None, :])[0]) if len(side.times_ms) else None


def _outcome(mean: StatisticChange) -> Literal["slower", "faster", "same", "unknown"]:
    if mean.real is None or mean.change is None:
        return "unknown"

    if not mean.real or abs(mean.change) < _WORTH:
        return "same"

    return "slower" if mean.change > 0 else "faster"


def _alike(mean: StatisticChange, phases: list[PhaseChange], samples: tuple[float, float]) -> str:
    """Return a sentence if every phase changed alike, as it does when one run had a slower machine; else nothing.

    A change of the code is seldom in all phases; the load of a shared machine always is, and no test within two runs
    can distinguish it from the code.

    Args:
        mean: the mean time per sample, or of a step, which counts as one sample then.
        samples: samples in a step of each run.
    """
    whole = np.log1p(mean.change or 0.0)
    a_ms = np.array([row.a_ms for row in phases]) / samples[0]
    b_ms = np.array([row.b_ms for row in phases]) / samples[1]
    large = (a_ms >= _LARGE * (mean.a_ms or 0.0)) & (b_ms > 0)
    ratios = (np.log(b_ms[large] / a_ms[large]) / whole).tolist()
    if len(ratios) < _MIN_PHASES or min(ratios) < _ALIKE:
        return ""

    return (
        f"all {len(ratios)} large phases are {'slower' if whole > 0 else 'faster'}, as when the machine was under "
        "different load: repeat the run to distinguish that from a change in the code"
    )


def _about(side: ComparedRun) -> RunSide:
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
        samples_per_step=steps.samples_per_step,
        model=side.report.setup.model,
        core_wait_share=side.report.setup.core_wait_share,
        verdict=side.report.verdict.kind.value,
        time=side.report.time,
    )


def _obstacles(a: ComparedRun, b: ComparedRun, letter: str) -> list[str]:
    """Return the reasons why the two cannot be compared."""
    reasons = []
    sizes = [side.report.run.world_size for side in (a, b)]
    if sizes[0] != sizes[1]:
        ran = f"A ran on {plural(sizes[0], 'rank')}, {letter} on {sizes[1]}"
        reasons.append(f"{ran}: a step is not the same work; compare runs with the same number of ranks")

    for name in ("model", "parameters", "dtype", "device"):
        values = [side.report.setup.model.get(name) for side in (a, b)]
        if None not in values and values[0] != values[1]:
            reasons.append(f"the models differ: {name} {values[0]} in A, {values[1]} in {letter}")

    for side, which in ((a, "A"), (b, letter)):
        if side.is_file and not len(side.times_ms) and side.report.steps.count:
            reasons.append(f"{which} is a report without step times: of an earlier version, or written during the run")
        elif not len(side.times_ms):
            reasons.append(f"{which} has no complete steps")

    return reasons


def _differences(a: ComparedRun, b: ComparedRun, letter: str, samples: tuple[float, float] | None) -> list[str]:
    """Return other differences that matter for the comparison; `samples`: of a step, where they differ."""
    remarks = []
    if samples:
        sizes = f"{samples[0]:g} in A, {samples[1]:g} in {letter}"
        remarks.append(f"samples in a step: {sizes}; the time per sample is compared")

    models = (a.report.setup.model, b.report.setup.model)
    of_models = (("torch.compile", "compiled"), ("parallelism", "parallel")) if all(models) else ()
    pairs = (
        ("batch size", a.report.setup.batch_size, b.report.setup.batch_size),
        *((what, *(model.get(name) for model in models)) for what, name in of_models),
        _hosts(a, b),
    )
    remarks += [
        f"{what}: {_word(before)} in A, {_word(after)} in {letter}"
        for what, before, after in pairs
        # Not every loader reports its batches' size, and not every step has one of them.
        if before != after and (what != "batch size" or (None not in (before, after) and not samples))
    ]
    remarks += source_remarks(a.report, b.report, letter)
    waits = [side.report.setup.core_wait_share or 0.0 for side in (a, b)]
    if max(waits) > _BUSY:
        remarks.append(
            f"ranks waited for a CPU core for {percent_text(waits[0])} of the time that they had work in A, "
            f"{percent_text(waits[1])} in {letter}: other programs on the machine may be the difference"
        )

    for side, which in ((a, "A"), (b, letter)):
        if side.report.run.state != RunStatus.FINISHED:
            remarks.append(f"{which} is {side.report.run.state}, not finished")

        if side.report.steps.cut or (side.is_file and side.report.step_times.of_steps > len(side.times_ms)):
            steps = f"{len(side.times_ms):,} of its {side.report.steps.count:,} steps"
            remarks.append(f"{which} is long: {steps}, spread over the run, are compared")

    return remarks


def _hosts(a: ComparedRun, b: ComparedRun) -> tuple[str, str | None, str | None]:
    """Return the hosts of each run that the other one does not have, in words: jobs have hundreds in common."""
    both = {*a.report.run.hosts}.intersection(b.report.run.hosts)
    first, second = (names_text([host for host in side.report.run.hosts if host not in both]) for side in (a, b))
    return "hosts of one run only" if both else "hosts", first or None, second or None


def _outside_steps(a: ComparedRun, b: ComparedRun, letter: str) -> list[str]:
    """Return what else the training does between its steps, where that differs: the step time does not contain it."""
    remarks = []
    step_ms = a.report.steps.mean_ms or 0.0
    for part in _BETWEEN_STEPS:
        before, after = (_ms_per_step(side.report, part) for side in (a, b))
        if before is not None and after is not None and abs(after - before) > _LARGE * step_ms:
            took = f"{ms_text(before)} per step in A, {ms_text(after)} in {letter}"
            remarks.append(f"not in the step time: {part_words(part)}, {took}")

    return remarks


def _ms_per_step(report: Report, part: str) -> float | None:
    """Return a part of the wall time per step that steps do not contain; None if the wall time is not known."""
    if report.time is None or not report.steps.count:
        return None

    per_step = {each.part: 1e3 * each.seconds / report.steps.count for each in report.time.parts}
    spent = per_step.get(part, 0.0)
    if part not in _WITH_STEPS:
        return spent

    # The wait for the first batch of an epoch is in the step that takes it.
    beyond = sum(per_step.get(each, 0.0) for each in _WITH_STEPS) - (report.steps.mean_ms or 0.0)
    return min(max(beyond, 0.0), spent)


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]

    return str(value)


def _phases(a: ComparedRun, b: ComparedRun) -> list[PhaseChange]:
    """Return the phases of both, the largest change first; none if those of one are not known."""
    if not a.report.phases or not b.report.phases:
        return []

    means = [{phase.phase: phase.mean_ms for phase in side.report.phases} for side in (a, b)]
    changes = []
    for name in dict.fromkeys([*means[0], *means[1]]):
        before, after = means[0].get(name, 0.0), means[1].get(name, 0.0)
        delta = significant(after - before) or 0.0
        changes.append(PhaseChange(phase=name, a_ms=before, b_ms=after, delta_ms=delta))

    return sorted(changes, key=lambda change: -abs(change.delta_ms))


def _ranks(a: ComparedRun, b: ComparedRun) -> list[RankChange]:
    """Return the own work per step of each rank, and the phase with the largest change."""
    before, after = (_work_by_rank(side) for side in (a, b))
    return [_rank(rank, before.get(rank), after.get(rank)) for rank in sorted({*before, *after})]


def _rank(rank: int, before: dict[str, float] | None, after: dict[str, float] | None) -> RankChange:
    works = [None if work is None else sum(work.values()) for work in (before, after)]
    change = RankChange(
        rank=rank,
        a_work_ms=significant(works[0]),
        b_work_ms=significant(works[1]),
        change=significant(_change(*works)),
        phase=None,
        phase_delta_ms=None,
    )
    if before is not None and after is not None:
        deltas = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
        change.phase = max(deltas, key=lambda name: abs(deltas[name]))
        change.phase_delta_ms = significant(deltas[change.phase])

    return change


def _work_by_rank(side: ComparedRun) -> dict[int, dict[str, float]]:
    work: dict[int, dict[str, float]] = {}
    for phase in side.report.phases:
        if phase.phase != "comm":
            for entry in phase.by_rank:
                work.setdefault(entry.rank, {})[phase.phase] = entry.mean_ms

    return work


def _peaks(a: ComparedRun, b: ComparedRun, name: str) -> MemoryChange:
    """Return the highest peak over ranks."""
    peaks = [
        max((size for entry in side.report.memory.by_rank if (size := getattr(entry, name))), default=None)
        for side in (a, b)
    ]
    return MemoryChange(a=peaks[0], b=peaks[1], change=significant(_change(peaks[0], peaks[1])))


def _verdicts(a: ComparedRun, b: ComparedRun) -> VerdictChange:
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


def metric_changes(a: Report, b: Report) -> list[MetricChange]:
    """Return the last values of metrics that both runs have, losses first; those of rank 0."""
    names = [name for name in a.metrics if name in b.metrics and name == name_without_rank(name)]
    changes = [_metric(name, a.metrics[name].last, b.metrics[name].last) for name in names]
    return sorted(changes, key=lambda change: (not is_loss(change.name), name_order(change.name)))


def param_changes(a: Report, b: Report) -> list[ParamChange]:
    """Return the parameters whose values differ; of a missing one the value is None."""
    first, second = a.setup.params, b.setup.params
    names = dict.fromkeys([*first, *second])
    return [
        ParamChange(name=name, a=first.get(name), b=second.get(name))
        for name in names
        if first.get(name) != second.get(name)
    ]


def _metric(name: str, before: float | None, after: float | None) -> MetricChange:
    change = after / before - 1 if before is not None and before > 0 and after is not None and after >= 0 else None
    return MetricChange(name=name, a=before, b=after, change=significant(change))
