"""Overview of a trace: kinds of work and their overlap, I/O, kernels and operators, ranks, a timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.stats import GroupStat
from traceml.traces.aggregate.work_kinds import (
    COMM,
    COMPUTE,
    COPY,
    HOST,
    HOST_COMM,
    IO,
    WORK_KINDS,
    classify,
    io_direction,
)
from traceml.traces.query.analysis import Analysis
from traceml.traces.query.result import merged_groups, microseconds, stat_row

__all__ = ["report_of"]

_BINS = 60
_ROWS = 25  # of each table


def report_of(analysis: Analysis) -> dict[str, Any]:
    """Return the report of a finished analysis of a query with `report`; times in microseconds."""
    together = next((times for _, times in analysis.everything.units()), np.zeros(1 << len(WORK_KINDS), np.int64))
    work = _BusyTimes(analysis, devices=bool(_busy(together, 1 << COMPUTE)))
    stats = merged_groups(analysis, slice(len(analysis.query.by), None))
    return {
        "overlap": work.row(together),
        "io": _io(analysis, work, together),
        "kernels": _table(analysis, stats, {"kernel", "gpu_memcpy", "gpu_memset"}, "total"),
        "operators": _table(analysis, stats, {"cpu_op"}, "self_ns"),
        "processes": _processes(analysis, work),
        "ranks": _ranks(analysis, work),
        "timeline": _timeline(analysis),
    }


class _BusyTimes:
    """Conversion of times by set of kinds to named times.

    Args:
        devices: whether a device computes; else operators on the host count as computing.
    """

    def __init__(self, analysis: Analysis, *, devices: bool) -> None:
        self._fractional = analysis.fractional
        self._compute = 1 << COMPUTE if devices else 1 << COMPUTE | 1 << HOST
        self._comm = 1 << COMM if devices else 1 << COMM | 1 << HOST_COMM

    def row(self, times: NDArray[np.int64]) -> dict[str, Any]:
        """Return the time of each kind, in total and without computing at the same time."""
        io, comm, copy = 1 << IO, self._comm, 1 << COPY
        total = int(times.sum())
        row = {
            "duration_us": total,
            "compute_us": _busy(times, self._compute),
            "io_us": _busy(times, io),
            "comm_us": _busy(times, comm),
            "copy_us": _busy(times, copy),
            "unoverlapped_io_us": _busy(times, io, without=self._compute),
            "unoverlapped_comm_us": _busy(times, comm, without=self._compute),
            "unoverlapped_copy_us": _busy(times, copy, without=self._compute),
            "idle_us": total - _busy(times, self._compute | io | comm | copy),
        }
        return {key: microseconds(value, fractional=self._fractional) for key, value in row.items()}


def _busy(times: NDArray[np.int64], kinds: int, *, without: int = 0) -> int:
    """Return the time during which any of `kinds` and none of `without` was active."""
    sets = np.arange(len(times))
    return int(times[(sets & kinds != 0) & (sets & without == 0)].sum())


def _io(analysis: Analysis, work: _BusyTimes, together: NDArray[np.int64]) -> dict[str, Any]:
    """Return bytes by call; bandwidth is bytes divided by the time during which any such call was open."""
    calls: dict[tuple[Any, ...], tuple[GroupStat, int]] = {}
    for number in range(len(analysis.groups[-1])):
        labels = analysis.labels(number)[len(analysis.query.by) :]
        stat = analysis.stat(number)
        if stat.count and classify(*labels) == IO:
            size = int(analysis.bytes[number]) if number < len(analysis.bytes) else 0
            known, earlier = calls.setdefault(labels, (GroupStat(), 0))
            known.merge(stat)
            calls[labels] = known, earlier + (size if io_direction(labels[1]) != "other" else 0)

    busy_us = work.row(together)["io_us"]
    rows = [_call(labels, stat, size, analysis.fractional) for labels, (stat, size) in calls.items()]
    sums = {way: sum(row["bytes"] for row in rows if row["direction"] == way) for way in ("read", "write")}
    return {
        "read_bytes": sums["read"],
        "write_bytes": sums["write"],
        "busy_us": busy_us,
        "bytes_per_s": sum(sums.values()) * 1e6 / busy_us if busy_us else None,
        "calls": sorted(rows, key=lambda row: -row["sum_us"])[:_ROWS],
    }


def _call(labels: tuple[Any, ...], stat: GroupStat, size: int, fractional: bool) -> dict[str, Any]:
    sum_us = microseconds(stat.total, fractional=fractional)
    return {
        "cat": labels[0],
        "name": labels[1],
        "direction": io_direction(labels[1]),
        "count": stat.count,
        "sum_us": sum_us,
        "bytes": size,
        "bytes_per_s": size * 1e6 / sum_us if sum_us else None,
    }


def _table(
    analysis: Analysis, stats: Mapping[tuple[Any, ...], GroupStat], categories: set[str], order: str
) -> list[dict[str, Any]]:
    """Return the largest groups of some categories."""
    chosen = [(labels, stat) for labels, stat in stats.items() if str(labels[0]).lower() in categories]
    chosen.sort(key=lambda item: -getattr(item[1], order))
    return [
        {"cat": cat, "name": name, "kind": WORK_KINDS[classify(cat, name)]}
        | stat_row(stat, fractional=analysis.fractional)
        for (cat, name), stat in chosen[:_ROWS]
    ]


def _processes(analysis: Analysis, work: _BusyTimes) -> list[dict[str, Any]]:
    rows = []
    for number, times in analysis.processes.units():
        source, pid = analysis.context.process(number)
        where = {"file": str(analysis.context.paths[source]), "pid": pid}
        labels = analysis.context.labels
        names = {
            "name": labels.process(source, pid),
            "rank": labels.rank(source, pid),
            "host": labels.host(source, pid),
        }
        rows.append({**where, **names, **work.row(times)})

    return rows


def _ranks(analysis: Analysis, work: _BusyTimes) -> list[dict[str, Any]]:
    """Return a row per rank: for its files if each rank wrote its own, else for its processes."""
    labels, context = analysis.context.labels, analysis.context
    sums: dict[int, NDArray[np.int64]] = {}
    hosts: dict[int, str | None] = {}
    for number, times in analysis.processes.units():
        source, pid = context.process(number)
        if (rank := labels.process_rank(source, pid)) is not None:
            sums[rank] = times + sums.get(rank, 0)
            hosts.setdefault(rank, labels.host(source, pid))

    units = (
        analysis.files.units() if len(context.paths) > 1 else ((0, times) for _, times in analysis.everything.units())
    )
    named = set(sums)
    for source, times in units:
        if (rank := labels.rank(source, None)) is not None and rank not in named:
            sums[rank] = times + sums.get(rank, 0)
            hosts.setdefault(rank, labels.host(source, None))

    return [{"rank": rank, "host": hosts[rank], **work.row(sums[rank])} for rank in sorted(sums)]


def _timeline(analysis: Analysis) -> dict[str, Any] | None:
    line = analysis.everything.timeline
    assert line is not None
    used = np.flatnonzero(line.bins.any(axis=0))
    if not len(used):
        return None

    per_bin = -(-(int(used[-1]) + 1) // _BINS)
    bins = [line.bins[:, at : at + per_bin].sum(axis=1) for at in range(0, int(used[-1]) + 1, per_bin)]
    return {
        "begin_us": line.begin_ns / 1000,
        "bin_us": line.width_ns * per_bin / 1000,
        "bins": [_bin(counts.tolist()) for counts in bins],
    }


def _bin(counts: Sequence[int]) -> dict[str, Any]:
    busy = {f"{name}_us": time_ns / 1000 for name, time_ns in zip(WORK_KINDS, counts[:-1], strict=True)}
    return {"spans": counts[-1], **busy}
