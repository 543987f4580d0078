"""Contents of the tables of a running job, made from its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from traceml.formatting import (
    bytes_text,
    count_text,
    ms_text,
    name_order,
    percent_text,
    phase_label,
    printable,
    value_text,
)
from traceml.renderers.text.bars import phase_color
from traceml.renderers.views import RankRow, RunView
from traceml.runs.report.report_types import Report
from traceml.runs.rows.messages import RunMessage

__all__ = [
    "BarCell",
    "TableColumn",
    "TableRow",
    "TableView",
    "TrendCell",
    "logs_table",
    "memory_table",
    "metrics_table",
    "phases_table",
    "ranks_table",
    "system_table",
]

_OUTPUT_LINES = 100


@dataclass(frozen=True, slots=True)
class BarCell:
    """A cell with a bar, filled by a share of 0..1."""

    share: float
    style: str = ""


@dataclass(frozen=True, slots=True)
class TrendCell:
    """A cell with values over time, oldest first."""

    values: tuple[float, ...]


Cell = str | BarCell | TrendCell


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column: its head, whether its cells are right-aligned, and whether it fills the rest of the line."""

    head: str
    right: bool = True
    fills: bool = False


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row; `style` marks rows that need attention."""

    cells: tuple[Cell, ...]
    style: str = ""


@dataclass(frozen=True, slots=True)
class TableView:
    """A table; `empty` is the text shown when it has no rows."""

    name: str
    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]
    empty: str = "nothing yet"


def _right(head: str) -> TableColumn:
    return TableColumn(head)


def _left(head: str) -> TableColumn:
    return TableColumn(head, right=False)


def _wide(head: str = "") -> TableColumn:
    return TableColumn(head, right=False, fills=True)


def phases_table(report: Report) -> TableView:
    """Return the phases of a step: mean, share, and the ranks with the least and the most."""
    rows = []
    for phase in report.phases:
        by_rank = [(entry.mean_ms, entry.rank) for entry in phase.by_rank]
        ends = [f"{ms_text(ms)} r{rank}" for ms, rank in (min(by_rank), max(by_rank))] if by_rank else ["-", "-"]
        bar = BarCell(phase.share, phase_color(phase.phase))
        rows.append(TableRow((phase_label(phase.phase), ms_text(phase.mean_ms), percent_text(phase.share), bar, *ends)))

    columns = (_left("phase"), _right("mean"), _right("share"), _wide(), _right("min"), _right("max"))
    return TableView("phases", columns, tuple(rows), "no step has ended yet")


def ranks_table(now: RunView) -> TableView:
    """Return the ranks: steps, step time, own work, waiting, state."""
    columns = (
        _right("rank"),
        _left("host"),
        _right("steps"),
        _right("step"),
        _right("own work"),
        _right("waiting"),
        _wide("state"),
    )
    return TableView("ranks", columns, tuple(_rank(row) for row in now.ranks), "no rank has connected yet")


def _rank(row: RankRow) -> TableRow:
    work, waiting = (ms_text(row.work_ms), ms_text(row.step_ms - row.work_ms)) if row.phases else ("-", "-")
    state = row.end or (f"{row.state}, slowest" if row.slowest else row.state)
    cells = (str(row.rank), row.host, count_text(row.steps), *row.times(), work, waiting)
    return TableRow((*cells, state), "bold red" if row.end or row.slowest else "")


def memory_table(report: Report) -> TableView:
    """Return memory by rank: peak RSS, its growth per step, device peak."""
    entries = report.memory.by_rank
    most = max((entry.rss_peak_bytes or 0 for entry in entries), default=0) or 1
    rows = [
        TableRow(
            (
                str(entry.rank),
                bytes_text(entry.rss_peak_bytes),
                _growth(entry.rss_slope_bytes_per_step),
                bytes_text(entry.cuda_peak_bytes),
                BarCell((entry.rss_peak_bytes or 0) / most, "cyan"),
            )
        )
        for entry in entries
    ]
    columns = (_right("rank"), _right("peak RSS"), _right("growth per step"), _right("device peak"), _wide())
    return TableView("memory", columns, tuple(rows), "no sample yet")


def _growth(slope: float | None) -> str:
    if slope is None:
        return "-"

    return f"{'-' if slope < 0 else '+'}{bytes_text(round(abs(slope)))}" if abs(slope) >= 0.5 else "none"


def metrics_table(report: Report, trends: Mapping[str, Sequence[float]]) -> TableView:
    """Return the logged metrics by name."""
    rows = [
        TableRow(
            (
                name,
                *(value_text(value) for value in (entry.last, entry.min, entry.max)),
                count_text(entry.count),
                TrendCell(tuple(trends.get(name, ()))),
            ),
            "bold red" if entry.last is None else "",
        )
        for name, entry in sorted(report.metrics.items(), key=lambda item: name_order(item[0]))
    ]
    columns = (
        _left("metric"),
        _right("last"),
        _right("min"),
        _right("max"),
        _right("values"),
        _wide("over its steps"),
    )
    return TableView("metrics", columns, tuple(rows), "nothing logged yet: traceml.log_metric(name, value)")


def logs_table(notes: Sequence[RunMessage], output: Sequence[str] = ()) -> TableView:
    """Return the last lines of the script's output, then messages and events; both the newest first.

    Args:
        output: lines as they were written, which have no time.
    """
    rows = [TableRow(("", "", "output", printable(line))) for line in output[: -_OUTPUT_LINES - 1 : -1]]
    rows += [
        TableRow(
            (
                time.strftime("%H:%M:%S", time.localtime(note.epoch_s)),
                "" if note.rank is None else str(note.rank),
                note.kind,
                note.text,
            ),
            "yellow" if note.kind in ("warning", "exit", "refused") else "",
        )
        for note in notes
    ]
    columns = (_left("time"), _right("rank"), _left("kind"), _wide())
    return TableView("logs", columns, tuple(rows), "no messages yet")


def system_table(report: Report) -> TableView:
    """Return mean utilization and highest memory use of hosts and their devices."""
    rows: list[TableRow] = []
    for host in report.system.hosts:
        rows.append(_device(host.host, host.cpu_pct, host.memory_pct, "-", "-"))
        for gpu in host.gpus:
            used, total = gpu.memory_used_bytes or 0, gpu.memory_total_bytes or 0
            share = 100 * used / total if total else None
            degrees, watts = _number(gpu.temperature_c, "C"), _number(gpu.power_w, "W")
            rows.append(_device(f"  gpu {gpu.index}", gpu.utilization_pct, share, degrees, watts))

    columns = (_left("host"), _right("util"), _wide(), _right("memory"), _wide(), _right("temp"), _right("power"))
    return TableView("system", columns, tuple(rows), "no sample yet")


def _device(name: str, busy_pct: float | None, memory_pct: float | None, temperature: str, power: str) -> TableRow:
    busy, memory = (None if value is None else value / 100 for value in (busy_pct, memory_pct))
    bars = (BarCell(busy or 0.0, "green"), BarCell(memory or 0.0, "cyan"))
    return TableRow((name, percent_text(busy), bars[0], percent_text(memory), bars[1], temperature, power))


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f} {unit}"
