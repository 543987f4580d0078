"""Values of a run's metrics for monitoring systems, from its report: the same figures as on every screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from traceml.renderers.monitoring_metrics import Instrument, Instruments
from traceml.runs.report.report_types import Report

__all__ = ["MAX_RANKS", "Reading", "readings"]

MAX_RANKS = 64
"""Ranks of a run up to which each has series of its own; above, there are statistics over ranks only."""

_MAX_NAMES = 100  # of logged metrics, and of phases
_STATISTICS = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
_Values = Iterator["Reading"]


class Reading(NamedTuple):
    """A value of a metric; the labels are in the order of the metric's label names."""

    instrument: Instrument
    labels: tuple[str, ...]
    value: float


def readings(report: Report, most_ranks: int = MAX_RANKS) -> list[Reading]:
    """Return the values of a run; what is not known has none.

    Args:
        most_ranks: ranks up to which each has series of its own.
    """
    by_rank = len(report.ranks) <= most_ranks
    parts: tuple[Callable[[Report], _Values], ...] = (_run, _steps, _phases, _logged, _memory, _hosts, _time, _findings)
    run = report.run.id
    found = [each for part in (*parts, _tracing) for each in part(report)]
    if by_rank:
        found += [*_steps_by_rank(report), *_phases_by_rank(report), *_memory_by_rank(report)]

    return [each._replace(labels=(run, *each.labels)) for each in found]


def _one(instrument: Instrument, value: float | None, *labels: object, scale: float = 1.0) -> _Values:
    """Yield a value in its base unit, if it is known; the label `run` is added later."""
    if value is not None:
        yield Reading(instrument, tuple(map(str, labels)), value * scale)


def _spread(instrument: Instrument, values: Sequence[float], *labels: str, scale: float = 1.0) -> _Values:
    if values:
        found = np.quantile(values, list(_STATISTICS.values())).tolist()
        for name, value in zip(_STATISTICS, found, strict=True):
            yield from _one(instrument, value, *labels, name, scale=scale)


def _run(report: Report) -> _Values:
    run = report.run
    yield from _one(Instruments.RUN, 1.0, run.name, run.project, run.state)
    yield from _one(Instruments.WORLD, run.world_size)
    yield from _one(Instruments.RESTARTS, run.attempt)
    for state, count in sorted(Counter(rank.state for rank in report.ranks).items()):
        yield from _one(Instruments.RANKS, count, state)


def _steps(report: Report) -> _Values:
    steps = report.steps
    yield from _one(Instruments.STEPS, steps.count)
    yield from _one(Instruments.STEP, steps.mean_ms, scale=1e-3)
    for percentile, value in ((50, steps.p50_ms), (95, steps.p95_ms), (99, steps.p99_ms)):
        yield from _one(Instruments.STEP_PERCENTILE, value, percentile, scale=1e-3)

    yield from _one(Instruments.STEP_RATE, steps.speed(running=report.run.ended is None))
    yield from _one(Instruments.SAMPLE_RATE, steps.samples_per_second)
    yield from _one(Instruments.TOKEN_RATE, steps.tokens_per_second)


def _steps_by_rank(report: Report) -> _Values:
    for rank in report.ranks:
        yield from _one(Instruments.RANK_STEPS, rank.steps, rank.rank)


def _phases(report: Report) -> _Values:
    for phase in report.phases[:_MAX_NAMES]:
        yield from _one(Instruments.PHASE_MEAN, phase.mean_ms, phase.phase, scale=1e-3)
        yield from _one(Instruments.PHASE_SHARE, phase.share, phase.phase)
        means = [each.mean_ms for each in phase.by_rank]
        yield from _spread(Instruments.PHASE_SPREAD, means, phase.phase, scale=1e-3)


def _phases_by_rank(report: Report) -> _Values:
    for phase in report.phases[:_MAX_NAMES]:
        for each in phase.by_rank:
            yield from _one(Instruments.PHASE, each.mean_ms, each.rank, phase.phase, scale=1e-3)


def _logged(report: Report) -> _Values:
    of_rank_0_first = sorted(report.metrics.items(), key=lambda each: "/rank_" in each[0])
    for name, metric in of_rank_0_first[:_MAX_NAMES]:
        yield from _one(Instruments.LOGGED, metric.last, name)


def _memory(report: Report) -> _Values:
    ranks = report.memory.by_rank
    yield from _spread(Instruments.RSS_SPREAD, _known(rank.rss_peak_bytes for rank in ranks))
    yield from _spread(Instruments.CUDA_SPREAD, _known(rank.cuda_peak_bytes for rank in ranks))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _memory_by_rank(report: Report) -> _Values:
    for rank in report.memory.by_rank:
        yield from _one(Instruments.RSS, rank.rss_peak_bytes, rank.rank)
        yield from _one(Instruments.CUDA, rank.cuda_peak_bytes, rank.rank)


def _hosts(report: Report) -> _Values:
    for host in report.system.hosts:
        yield from _one(Instruments.HOST_CPU, host.cpu_pct, host.host, scale=1e-2)
        yield from _one(Instruments.HOST_MEMORY, host.memory_pct, host.host, scale=1e-2)
        for gpu in host.gpus:
            device = host.host, gpu.index
            yield from _one(Instruments.GPU_USE, gpu.utilization_pct, *device, scale=1e-2)
            yield from _one(Instruments.GPU_MEMORY, gpu.memory_used_bytes, *device)
            yield from _one(Instruments.GPU_SIZE, gpu.memory_total_bytes, *device)
            yield from _one(Instruments.GPU_HEAT, gpu.temperature_c, *device)
            yield from _one(Instruments.GPU_POWER, gpu.power_w, *device)


def _time(report: Report) -> _Values:
    if report.time is not None:
        yield from _one(Instruments.GOODPUT, report.time.goodput)
        for part in report.time.parts:
            yield from _one(Instruments.TIME, part.seconds, part.part)


def _findings(report: Report) -> _Values:
    verdict = report.verdict
    yield from _one(Instruments.VERDICT, 1.0, verdict.kind.value, verdict.severity.value)
    costs: dict[tuple[str, str], float] = {}
    for each in report.findings:  # several may have one kind: of two slow loaders, for example
        key = each.kind.value, each.severity.value
        costs[key] = max(costs.get(key, 0.0), each.cost_share)

    for key, cost in costs.items():
        yield from _one(Instruments.COST, cost, *key)


def _tracing(report: Report) -> _Values:
    telemetry = report.telemetry
    yield from _one(Instruments.ROWS, telemetry.rows_stored)
    yield from _one(Instruments.LOST, telemetry.rows_lost)
    yield from _one(Instruments.OVERHEAD, telemetry.overhead_us_per_step, scale=1e-6)
    yield from _one(Instruments.OVERHEAD_SHARE, telemetry.overhead_share)
    for package, count in telemetry.failures.items():
        yield from _one(Instruments.FAILURES, count, package)

    for tracker in report.trackers:
        yield from _one(Instruments.PENDING, tracker.pending, tracker.backend)
        yield from _one(Instruments.REFUSED, tracker.failed, tracker.backend)
