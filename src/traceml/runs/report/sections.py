"""Sections of the report, each from a summary: steps, phases, ranks, memory, system, telemetry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import GPU, HOST, PROCESS, TABLES, TELEMETRY, TORCH_MEMORY
from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.memory_growth import MemoryKind
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import significant
from traceml.diagnosis.steps.aligned_steps import AlignedSteps, Ints
from traceml.diagnosis.steps.step_split import PHASES
from traceml.runs.report.report_types import (
    ExitSection,
    GpuSection,
    HostSection,
    LineSection,
    MemorySection,
    MetricSection,
    PhaseSection,
    RankMean,
    RankMemory,
    RankSection,
    StepsSection,
    SystemSection,
    TelemetrySection,
    TimePart,
    TimeSection,
)
from traceml.runs.report.throughput import put_batch_sizes
from traceml.runs.rows.metrics import MetricSummary
from traceml.runs.rows.run_summary_reader import RunSummaryReader
from traceml.runs.rows.samples import SampleTotals
from traceml.runs.rows.step_totals import StepTotals
from traceml.runs.run_state import state_of

__all__ = ["lines", "memory", "metrics", "phases", "present_state", "ranks", "steps", "system", "telemetry", "time"]

_MS = 1e6
_MAX_LINES = 60  # of a phase
_QUANTILES = (0.5, 0.95, 0.99)
_ORDER = tuple(phase for phase in PHASES if phase not in ("user", "other"))


def steps(summary: RunSummaryReader, window: AlignedSteps) -> StepsSection:
    """Return the number of steps and their durations.

    Args:
        window: the steps to describe; of a long run a sample.
    """
    latest = summary.kept.latest
    counts = [steps_of(summary, rank, latest) for rank in range(latest.size)]
    section = StepsSection(
        count=max(counts, default=0),
        cut=summary.cut,
        diagnosed=len(window),
    )
    totals, times = _totals(summary), window.total.ravel()
    if times.size and not (window if totals is None else totals).device:
        section.untimed_device = summary.facts_builder.accelerator

    of_all = summary.sums_of_hosts()
    if of_all is not None and of_all.count.sum():
        section.summed_ranks = summary.world_size
        mean, quantiles = of_all.mean_ns, _quantiles(of_all, window)
    elif totals is not None:
        mean, quantiles = totals.mean_ns, _quantiles(totals, window)
    elif times.size:
        mean, quantiles = float(times.mean()), np.quantile(times, _QUANTILES).tolist()
    else:
        section.set_rate(_per_second(summary))
        return section

    put_batch_sizes(section, summary, window if totals is None else totals, counts)
    section.set_rate(_per_second(summary))
    section.mean_ms = significant(mean / _MS)
    section.p50_ms, section.p95_ms, section.p99_ms = (significant(value / _MS) for value in quantiles)
    return section


def _quantiles(totals: StepTotals, window: AlignedSteps) -> list[float]:
    """Return the percentiles of all steps; of those in the window if they have device times.

    The histogram of all steps has the host's times, which are not the device's where the host runs ahead of it.
    """
    if window.device and window.total.size:
        return [float(value) for value in np.quantile(window.total, _QUANTILES)]

    return totals.quantiles_ns(_QUANTILES)


def _totals(summary: RunSummaryReader) -> StepTotals | None:
    """Return the sums of all steps of a long run, without those of its set-up."""
    totals, set_up = summary.totals, summary.set_up
    return totals if totals is None or set_up is None else totals.without(set_up)


def steps_of(summary: RunSummaryReader, rank: int, latest: Ints) -> int:
    """Return the number of steps of a rank, without those before it resumed."""
    if rank >= len(latest) or latest[rank] < 0:
        return 0

    last = int(latest[rank])
    return last + 1 - summary.facts_builder.numbers.before(rank, last)


def _per_second(summary: RunSummaryReader) -> float | None:
    """Return steps per second of wall time, time between steps included, of the rank with the most steps."""
    latest, ends = summary.kept.latest, summary.kept.end_ns
    if not latest.size or not summary.first:
        return None

    rank = int(np.argmax(latest))
    last_step = int(latest[rank])
    first_step, first_end = summary.first.get(rank, (last_step, int(ends[rank])))
    passed_ns = int(ends[rank]) - first_end
    before = summary.facts_builder.numbers.before
    number = last_step - before(rank, last_step) - (first_step - before(rank, first_step))
    return significant(number / (passed_ns / 1e9)) if passed_ns > 0 else None


def phases(summary: RunSummaryReader, window: AlignedSteps) -> list[PhaseSection]:
    """Return mean milliseconds by phase and rank; backward is own work, comm includes the waiting inside it."""
    by_rank = _means_by_rank(summary, window)
    described = (summary.sums_of_hosts(), _totals(summary), window)
    of_steps = (_means_of_all(each, summary.grouped) for each in described if each is not None)
    means = next(filter(None, of_steps), None) or _averages(by_rank, np.ones(len(by_rank)))
    return [_phase(name, by_rank, means) for name in _names({**by_rank, -1: means} if means else {})]


def _means_of_all(steps: AlignedSteps | StepTotals, grouped: bool) -> dict[str, float]:
    """Return the mean milliseconds by phase of all steps of all ranks: they add up to the mean step."""
    counts = steps.count.sum(axis=1) if isinstance(steps, StepTotals) else np.full(len(steps.ranks), len(steps))
    return _averages(_means(steps, grouped), counts)


def _averages(by_rank: Mapping[int, Mapping[str, float]], weights: NDArray[Any]) -> dict[str, float]:
    if not weights.any():
        return {}

    names = dict.fromkeys(name for means in by_rank.values() for name in means)
    columns = {name: [means.get(name, 0.0) for means in by_rank.values()] for name in names}
    return {name: float(np.average(column, weights=weights)) for name, column in columns.items()}


def _means_by_rank(summary: RunSummaryReader, window: AlignedSteps) -> dict[int, dict[str, float]]:
    if (totals := _totals(summary)) is not None:
        return _means(totals, summary.grouped)

    by_rank = _means(window, summary.grouped)
    for rank in sorted(set(summary.ranks) - set(by_rank)):
        if rank < len(summary.kept.latest) and summary.kept.latest[rank] >= 0:
            by_rank |= _means(summary.kept.held(rank), summary.grouped)

    return by_rank


def _means(steps: AlignedSteps | StepTotals, grouped: bool) -> dict[int, dict[str, float]]:
    """Return each rank's mean milliseconds by phase; they add up to its mean step."""
    split = {name: (means / _MS).tolist() for name, means in steps.mean_split(grouped=grouped).items()}
    return {rank: {name: means[row] for name, means in split.items()} for row, rank in enumerate(steps.ranks.tolist())}


def _names(by_rank: dict[int, dict[str, float]]) -> list[str]:
    seen = {name for means in by_rank.values() for name, value in means.items() if value > 0}
    return [*(n for n in _ORDER if n in seen), *sorted(seen - {*_ORDER, "other"}), *(["other"] if by_rank else [])]


def _phase(name: str, by_rank: Mapping[int, Mapping[str, float]], means: Mapping[str, float]) -> PhaseSection:
    mean, whole = means.get(name, 0.0), sum(means.values())
    return PhaseSection(
        phase=name,
        mean_ms=_number(mean),
        share=_number(mean / whole) if whole else 0.0,
        by_rank=[RankMean(rank, _number(of_rank.get(name, 0.0))) for rank, of_rank in sorted(by_rank.items())],
    )


def _number(value: float) -> float:
    return significant(value) or 0.0


def present_state(summary: RunSummaryReader) -> str:
    """Return the state of the run, also where its aggregator is gone and recorded no end."""
    return state_of(summary.run, summary.aggregator, summary.written_s)


def ranks(summary: RunSummaryReader, *, is_hung: bool = False) -> list[RankSection]:
    """Return the state of each rank of the last attempt, and its end; of a lost run none is known to run.

    Args:
        is_hung: whether the job hung; then the stacks of ranks that made no progress are told, too.
    """
    latest = summary.kept.reached()
    is_lost = present_state(summary) == RunStatus.LOST
    return [
        RankSection(
            rank=rank,
            host=stream.host,
            pid=stream.identity.pid,
            steps=steps_of(summary, rank, latest),
            state="lost" if is_lost and stream.state == "running" else stream.state,
            exit=_exit(summary, stream, latest, is_hung=is_hung),
        )
        for rank, stream in sorted(summary.ranks.items())
    ]


def _exit(summary: RunSummaryReader, stream: StreamRecord, latest: Ints, *, is_hung: bool) -> ExitSection:
    ended = summary.facts_builder.exits.get(stream.rank) or RankExit.of_stream(stream)
    last_step = ended.last_step
    if stream.rank < len(latest) and latest[stream.rank] >= 0:
        # The rank's last report does not count the step that was still open.
        last_step = max(int(latest[stream.rank]), -1 if last_step is None else last_step)

    return ExitSection(
        code=ended.code,
        signal=ended.signal,
        exception=ended.exception,
        last_step=last_step if last_step is None else last_step + summary.facts_builder.counted_before,
        open_phase=ended.open_phase,
        stack=ended.stack or (_last_stack(summary, stream) if is_hung and ended.state != "finished" else None),
    )


def _last_stack(summary: RunSummaryReader, stream: StreamRecord) -> str | None:
    """Return the stack of a rank without progress as its last snapshot has it, in the form of a traceback."""
    snapshot = summary.facts_builder.progress.snapshot_of(stream.rank)
    if snapshot is None or not snapshot.frames:
        return None

    places = [
        f'  File "{frame.file}", line {frame.line}' + (f", in {frame.function}" if frame.function else "")
        for frame in reversed(snapshot.frames)  # a traceback has the innermost last
    ]
    return "\n".join([*places, ""])


def lines(summary: RunSummaryReader) -> list[LineSection]:
    """Return the most frequent lines of the user's code, over all ranks."""
    found: dict[tuple[Any, ...], LineSection] = {}
    of_phase: Counter[str] = Counter()
    for each in summary.sampled_lines():
        of_phase[each.part] += each.samples
        key = (each.part, each.file, each.line, each.function, each.library)
        section = found.setdefault(key, _line(each))
        section.samples += each.samples
        section.ranks.append(each.rank)

    for section in found.values():
        section.share = _number(section.samples / of_phase[section.phase])

    kept: list[LineSection] = []
    of_phase.clear()
    for section in sorted(found.values(), key=lambda section: -section.samples):
        of_phase[section.phase] += 1
        if of_phase[section.phase] <= _MAX_LINES:
            kept.append(section)

    return kept


def _line(seen: SampledLine) -> LineSection:
    return LineSection(phase=seen.part, file=seen.file, line=seen.line, function=seen.function, library=seen.library)


def time(summary: RunSummaryReader) -> TimeSection | None:
    """Return the run's wall time by part, None if unknown."""
    found = summary.facts_builder.time
    if found is None:
        return None

    parts = [TimePart(part, _number(seconds), _number(found.share(part))) for part, seconds in found.seconds.items()]
    useful = found.useful
    return TimeSection(
        wall_s=math.fsum(part.seconds for part in parts),  # of rounded parts: their sum differs in the sixth digit
        parts=[part for part in parts if part.seconds > 0],
        goodput=_number(found.goodput),
        productive_s=_number(useful.productive_s),
        productive_steps=useful.productive_steps,
        repeated_s=_number(useful.repeated_s),
        repeated_steps=useful.repeated_steps,
    )


def memory(summary: RunSummaryReader) -> MemorySection:
    """Return peaks and growth of memory by rank."""
    return MemorySection([_memory_of(summary, rank) for rank in sorted(summary.ranks)])


def _memory_of(summary: RunSummaryReader, rank: int) -> RankMemory:
    totals, memory = summary.sample_totals, RankMemory(rank=rank)
    memory.rss_peak_bytes = _whole(totals.most(PROCESS, rank, "rss_bytes"))
    memory.cuda_peak_bytes = _whole(totals.most(TORCH_MEMORY, rank, "peak_allocated_bytes"))
    growth = summary.facts_builder.memory.curve(rank, MemoryKind.RESIDENT).growth()
    memory.rss_slope_bytes_per_step = None if growth is None else significant(growth.bytes_per_step)

    return memory


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def system(summary: RunSummaryReader) -> SystemSection:
    """Return the utilization of hosts and devices."""
    totals = summary.sample_totals
    hosts = {stream.host: HostSection(host=stream.host) for stream in summary.ranks.values()}
    for rank in (rank for rank in totals.ranks(HOST) if rank in summary.ranks):
        used, size = (totals.most(HOST, rank, f"memory_{what}_bytes") for what in ("used", "total"))
        host = hosts[summary.ranks[rank].host]
        host.cpu_pct = significant(totals.mean(HOST, rank, "cpu_pct"))
        host.memory_pct = significant(100 * used / max(size, 1)) if used is not None and size is not None else None

    for rank in (rank for rank in totals.ranks(GPU) if rank in summary.ranks):
        gpus = hosts[summary.ranks[rank].host].gpus
        known = {gpu.index for gpu in gpus}  # ranks with GPUs of their own sample these
        gpus += [_gpu(totals, rank, index) for index in totals.devices(GPU, rank) if index not in known]

    return SystemSection(list(hosts.values()))


def _gpu(totals: SampleTotals, rank: int, index: int) -> GpuSection:
    return GpuSection(
        index=index,
        utilization_pct=significant(totals.mean(GPU, rank, "utilization_pct", index)),
        memory_used_bytes=_whole(totals.most(GPU, rank, "memory_used_bytes", index)),
        memory_total_bytes=_whole(totals.most(GPU, rank, "memory_total_bytes", index)),
        temperature_c=significant(totals.most(GPU, rank, "temperature_c", index)),
        power_w=significant(totals.mean(GPU, rank, "power_w", index)),
    )


def metrics(summary: MetricSummary) -> dict[str, MetricSection]:
    """Return the figures of each metric; a value that is not finite is None there."""
    return {
        name: MetricSection(
            last=_finite(each.last), min=_finite(each.least), max=_finite(each.greatest), count=each.number
        )
        for name, each in summary.figures().items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def telemetry(summary: RunSummaryReader, reader: StoreReader, step_ms: float | None) -> TelemetrySection:
    """Return the rows that tracing stored and lost, and its overhead."""
    stored, lost = reader.stored(TABLES), reader.lost(TABLES)
    last = [row for rank in sorted(summary.ranks) if (row := summary.samples.last(TELEMETRY.name, rank)) is not None]
    hooks = [int(row["hook_ns_per_step"]) for row in last if row["hook_ns_per_step"] > 0]
    overhead_us = float(np.mean(hooks)) / 1e3 if hooks else None
    # Of a rank whose host is out of reach nobody knows what it appended after its last row.
    is_unknown = any(record.facts.get("total_unknown") for record in reader.streams() if record.state != "running")
    appended = stored + lost
    if summary.state == RunStatus.RUNNING:
        appended = max(appended, sum(int(row["rows_appended"]) for row in last))

    return TelemetrySection(
        rows_appended=None if is_unknown else appended,
        rows_stored=stored,
        rows_lost=None if is_unknown else lost,
        rows_thinned=reader.thinned_rows(),
        overhead_us_per_step=None if overhead_us is None else significant(overhead_us),
        overhead_share=significant(overhead_us / 1e3 / step_ms) if overhead_us is not None and step_ms else None,
        bytes_sent=sum(int(row["bytes_sent"]) for row in last),
        failures=_failures(summary, reader),
    )


def _failures(summary: RunSummaryReader, reader: StoreReader) -> dict[str, int]:
    """Return the failures that ranks and aggregator have handled, by package."""
    total: Counter[str] = Counter(reader.meta().get("failures", {}))
    for record in summary.ranks.values():
        total.update(record.facts.get("failures", {}))

    return dict(sorted(total.items()))
