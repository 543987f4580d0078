"""Series of a run over steps and over time, for the charts of page, report and notebook.

A running and an ended run give the same numbers, as both come from a summary of the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import rows_by
from traceml.database.schema import GPU, HOST, PROCESS, TORCH_MEMORY, Table
from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.formatting import name_without_rank
from traceml.run_folder import STORE_NAME
from traceml.runs.rows.bins import StepBins
from traceml.runs.rows.metric_series import MetricSeries, MetricSeriesSet
from traceml.runs.rows.run_summary_reader import RunSummaryReader, read_run_summary

__all__ = ["HeatMap", "RunSeries", "SampleSeries", "SeriesFollower", "StepSeries", "read_series", "summary_series"]

Floats = NDArray[Any]

_MS = 1e6
_MAX_SHOWN = 128
_WANTED_PER_BIN = 16
_MIN_SHOWN = 32
_HEAT_ROWS = 128
_SAMPLES = 240
# Device times arrive some steps after their step, and a step is taken only once.
_DEVICE_LAG = 32


class StepSeries(msgspec.Struct, frozen=True):
    """Step times and phases over the run, one value per bin of steps; NaN if a bin is empty.

    Attributes:
        steps: first step of each bin, width: steps per bin.
        p50_ms, p95_ms, p99_ms, max_ms: of the step times of all ranks; percentiles are accurate to one percent.
        phases_ms: mean of each phase per rank and step; their sum is the mean step.
    """

    steps: Ints
    width: int
    p50_ms: Floats
    p95_ms: Floats
    p99_ms: Floats
    max_ms: Floats
    phases_ms: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.steps)


class HeatMap(msgspec.Struct, frozen=True):
    """Own work over the run, rank x bin of steps; with very many ranks, the slowest of each group."""

    ranks: tuple[tuple[int, int], ...]  # first and last rank of each row
    steps: Ints  # first step of each bin, width: steps per bin
    width: int
    work_ms: Floats  # own work per step; NaN if a rank has none
    excess: Floats  # work above that of the median rank, as a share of the mean step


class SampleSeries(msgspec.Struct, frozen=True):
    """Sampled values over time."""

    label: str  # `rank 3`, a host or a device
    seconds: Floats  # since the start of the run, ascending
    values: Floats  # the samples; the highest value of those that were joined


class RunSeries(msgspec.Struct, frozen=True):
    """All series of a run.

    Attributes:
        memory: resident bytes by rank, device_memory: torch's allocated bytes by rank.
        cpu, host_memory: percent by host; gpu, gpu_memory: percent by device.
        metrics: the logged metrics, hidden_metrics: number of further names, several ranks counted once.
        attempt: attempt of the steps.
    """

    steps: StepSeries
    heat: HeatMap
    memory: tuple[SampleSeries, ...] = ()
    device_memory: tuple[SampleSeries, ...] = ()
    cpu: tuple[SampleSeries, ...] = ()
    host_memory: tuple[SampleSeries, ...] = ()
    gpu: tuple[SampleSeries, ...] = ()
    gpu_memory: tuple[SampleSeries, ...] = ()
    metrics: tuple[MetricSeries, ...] = ()
    hidden_metrics: int = 0
    attempt: int = 0


class SeriesFollower(msgspec.Struct):
    """Makes the series of a run that a summary follows; bounded in memory, cheap to update.

    Call `take` after each update of the summary, from its beginning or after a `backfill`, and `series` to draw them.
    """

    _bins: StepBins = msgspec.field(default_factory=StepBins)
    _lines: MetricSeriesSet = msgspec.field(default_factory=MetricSeriesSet)
    _attempt: int = -1

    def backfill(self, run_dir: Path) -> None:
        """Take what was stored before the summary began, with the bound of a report.

        Raises:
            StoreError: the store cannot be read.
        """
        with StoreReader(Path(run_dir) / STORE_NAME) as reader:
            self.take(read_run_summary(reader), reader)

    def take(self, summary: RunSummaryReader, reader: StoreReader) -> None:
        """Take what is new in a summary."""
        if summary.attempt != self._attempt:
            self._attempt = summary.attempt
            self._bins = StepBins(len(summary.ranks))
            if summary.totals is not None:
                self._bins.take_totals(summary.totals, summary.all_aligned())

        self._bins.grouped = summary.grouped

        self._lines.update(reader)
        latest = summary.kept.latest
        new = int(latest.max()) - self._bins.latest if latest.size else 0
        if new <= 0:
            return

        window = summary.kept.aligned(last=new, skip_first=0)
        if window.device and summary.state == RunStatus.RUNNING:
            window = window.select(slice(None, -_DEVICE_LAG))

        self._bins.take(window)

    def series(self, summary: RunSummaryReader) -> RunSeries:
        """Return the series so far."""
        joined = _joined_bins(self._bins)
        steps = _steps(self._bins, joined)
        lines, hidden = self._lines.lines(), {name_without_rank(name) for name in self._lines.hidden}
        return RunSeries(
            steps,
            _heat(self._bins, joined, steps),
            memory=_sampled(summary, PROCESS, "rss_bytes"),
            device_memory=_sampled(summary, TORCH_MEMORY, "allocated_bytes"),
            cpu=_sampled(summary, HOST, "cpu_pct"),
            host_memory=_sampled(summary, HOST, "memory_used_bytes", "memory_total_bytes"),
            gpu=_sampled(summary, GPU, "utilization_pct"),
            gpu_memory=_sampled(summary, GPU, "memory_used_bytes", "memory_total_bytes"),
            metrics=tuple(lines),
            hidden_metrics=len(hidden - {name_without_rank(line.name) for line in lines}),
            attempt=max(self._attempt, 0),
        )


def read_series(run_dir: Path) -> RunSeries:
    """Return the series of a run on disk, ended or still running.

    Raises:
        StoreError: the store cannot be read.
    """
    with StoreReader(Path(run_dir) / STORE_NAME) as reader:
        return summary_series(read_run_summary(reader), reader)


def summary_series(summary: RunSummaryReader, reader: StoreReader) -> RunSeries:
    """Return the series of the summary of a whole run."""
    follower = SeriesFollower()
    follower.take(summary, reader)
    return follower.series(summary)


def _joined_bins(bins: StepBins) -> int:
    """Return the number of bins to show as one, so that each is visible and has enough steps for percentiles."""
    joined = 1
    while bins.used // joined > _MAX_SHOWN:
        joined *= 2

    each = max(len(bins.ranks), 1) * bins.width
    while joined * each < _WANTED_PER_BIN and bins.used // (2 * joined) >= _MIN_SHOWN:
        joined *= 2

    return joined


def _steps(bins: StepBins, joined: int) -> StepSeries:
    p50, p95, p99 = (values / _MS for values in bins.percentiles_ns((0.5, 0.95, 0.99), joined))
    phases = {name: values / _MS for name, values in bins.phases_ns(joined).items()}
    return StepSeries(
        bins.steps(joined), bins.width * joined, p50, p95, p99, bins.longest_ns(joined) / _MS, phases
    )  # fmt: skip


def _heat(bins: StepBins, joined: int, steps: StepSeries) -> HeatMap:
    order = np.argsort(bins.ranks)
    ranks, work = bins.ranks[order], bins.work_ns(joined)[order] / _MS
    if not len(ranks):
        return HeatMap((), steps.steps, steps.width, np.empty((0, 0)), np.empty((0, 0)))

    each = -(-len(ranks) // _HEAT_ROWS)
    starts = np.arange(0, len(ranks), each)
    whole = sum(steps.phases_ms.values(), np.zeros(len(steps)))
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = (work - _median(work)) / np.where(whole > 0, whole, np.nan)

    ends = [*(starts[1:] - 1).tolist(), len(ranks) - 1]
    groups = tuple((int(ranks[start]), int(ranks[end])) for start, end in zip(starts.tolist(), ends, strict=True))
    slowest = [np.fmax.reduceat(values, starts, axis=0) for values in (work, excess)]
    return HeatMap(groups, steps.steps, steps.width, *slowest)


def _median(work: Floats) -> Floats:
    """Return the median over ranks by bin; of two ranks the faster one, of an even number the lower of both."""
    ordered = np.sort(work, axis=0)  # NaN last
    known = (~np.isnan(work)).sum(axis=0)
    lower = np.maximum(known - 1, 0) // 2
    median: Floats = np.take_along_axis(ordered, lower[None, :], axis=0)[0]
    return median


def _sampled(summary: RunSummaryReader, table: Table, column: str, of: str | None = None) -> tuple[SampleSeries, ...]:
    """Return a sampled column by rank, host or device; with `of`, as a percentage of that column."""
    found: dict[str, SampleSeries] = {}
    for rank in summary.samples.ranks(table.name):
        rows = summary.samples.of(table.name, rank)
        if rows is None or not len(rows) or rank not in summary.ranks:
            continue

        for label, mine in _labeled(table, rank, summary.ranks[rank].host, rows):
            found.setdefault(label, _line(summary, rank, label, mine["t_ns"], _percent(mine, column, of)))

    return tuple(found.values())


def _labeled(table: Table, rank: int, host: str, rows: NDArray[np.void]) -> list[tuple[str, NDArray[np.void]]]:
    if table is HOST:
        return [(host, rows)]

    if table is GPU:
        return [(f"{host} gpu {index}", own) for index, own in rows_by(rows, "index")]

    return [(f"rank {rank}", rows)]


def _percent(rows: NDArray[np.void], column: str, of: str | None) -> Floats:
    return rows[column] if of is None else 100 * rows[column] / np.maximum(rows[of], 1)


def _line(summary: RunSummaryReader, rank: int, label: str, t_ns: Ints, values: Floats) -> SampleSeries:
    mono_ns, epoch_ns = summary.ranks[rank].facts.get("clock") or (0, 0)
    started_ns = float(summary.run.get("started") or 0) * 1e9
    # Without the rank's clock, its first sample is the start.
    start_ns = started_ns - (int(epoch_ns) - int(mono_ns)) if mono_ns and started_ns else float(t_ns[0])
    each = -(-len(t_ns) // _SAMPLES)
    starts = np.arange(0, len(t_ns), each)
    peaks = np.maximum.reduceat(np.asarray(values, np.float64), starts)
    return SampleSeries(label, (t_ns[starts] - start_ns) / 1e9, peaks)
