"""Result of a trace analysis (`traceml.analysis/1`) as tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from traceml.formatting import bytes_text, count_text, ms_text, percent_text, plural, printable
from traceml.renderers.text.bars import bar, sparkline
from traceml.renderers.text.viewport import Viewport, column_text

__all__ = ["SECTIONS", "analysis_lines"]

SECTIONS = ("groups", "aggregated", "overlap", "io", "kernels", "operators", "processes", "timeline")

_MAX_WIDTH = 140
_BESIDE_BAR = 54  # columns of a line with a bar that are not the bar
_UNIT_LABEL = 18
_KIND_LABEL = 15
_ROWS = 8  # of the smaller tables
_WIDE = 100  # columns from which on all numbers are shown
_KINDS = (
    ("compute_us", "compute", "blue"),
    ("io_us", "I/O", "yellow"),
    ("comm_us", "communication", "red"),
    ("copy_us", "copies", "magenta"),
)
_TIMES = (("sum", "sum_us"), ("self", "self_us"), ("p50", "p50_us"), ("p99", "p99_us"), ("mean", "mean_us"))

_AGGREGATED_TIMES = (("sum", "sum_us"), ("mean", "mean_us"))

_UNIT = (  # the most important first: a narrow screen shows fewer
    ("time", "duration_us"),
    ("compute", "compute_us"),
    ("I/O", "io_us"),
    ("comm", "comm_us"),
    ("idle", "idle_us"),
    ("I/O alone", "unoverlapped_io_us"),
    ("comm alone", "unoverlapped_comm_us"),
    ("copies", "copy_us"),
)

_Column = tuple[str, int, Sequence[str]]  # title, width, cells


def analysis_lines(
    result: Mapping[str, Any],
    viewport: Viewport,
    *,
    top: int = 20,
    sections: Iterable[str] = SECTIONS,
    columns: Sequence[tuple[str, str]] = (),
) -> Iterator[Text]:
    """Yield the lines that show a result.

    Args:
        result: plain data of `traceml.analysis/1`.
        sections: some of SECTIONS; empty ones are left out.
        columns: measures of the groups, each with its key in a group; by default as many usual ones as fit.
    """
    yield from _head(result, viewport)
    report = result.get("report") or {}
    draws: dict[str, Iterator[Text]] = {
        "groups": _groups(result, viewport, top, columns),
        "aggregated": _aggregated(result, viewport, top),
        "overlap": _overlap(report.get("overlap"), viewport),
        "io": _io(report.get("io"), viewport),
        "kernels": _operations(report.get("kernels"), "Kernels", "sum_us", viewport),
        "operators": _operations(report.get("operators"), "Operators", "self_us", viewport),
        "processes": _units(report, viewport),
        "timeline": _timeline(report.get("timeline"), viewport),
    }
    for section in sections:
        lines = list(draws[section])
        if lines:
            yield Text()
            yield from lines


def _head(result: Mapping[str, Any], viewport: Viewport) -> Iterator[Text]:
    files = result["files"]
    what = files[0]["path"] if len(files) == 1 else f"{len(files)} files"
    size = bytes_text(sum(file["bytes"] for file in files))
    facts = f"{plural(result['events'], 'event')}, {plural(result['spans'], 'span')}, {size}"
    yield Text(f"{what}: ", style="bold").append(facts, style="")
    for file in files:
        for damage in file["damage"][:_ROWS]:
            lost = f", {bytes_text(damage['lost_bytes'])} lost" if damage["lost_bytes"] else ""
            where = f"at byte {damage['offset']:,}: " if damage["offset"] else ""
            yield Text(f"{viewport.glyphs.lost} damaged: ", style="bold yellow").append(
                f"{file['path']}: {where}{damage['what']}{lost}", style="yellow"
            )

        if len(file["damage"]) > _ROWS:
            yield Text(f"  and {len(file['damage']) - _ROWS} more in {file['path']}: --json lists all", style="yellow")


def _groups(
    result: Mapping[str, Any], viewport: Viewport, top: int, columns: Sequence[tuple[str, str]]
) -> Iterator[Text]:
    groups = result["groups"][:top]
    if not groups:
        yield Text("No span passes the conditions." if result.get("where") else "No spans: nothing has a duration.")
        return

    labels = _labels(groups, result["by"])
    total = sum(group["sum_us"] for group in result["groups"])
    shares = [percent_text(group["sum_us"] / total if total else None) for group in groups]
    numbers = [_measured(title, key, groups) for title, key in columns] or _numbers(groups, viewport)
    yield from _table(labels, [*numbers, ("of sum", 6, shares)], viewport)
    yield from _not_shown(result["groups"], top)


def _aggregated(result: Mapping[str, Any], viewport: Viewport, top: int) -> Iterator[Text]:
    calls = result.get("aggregated")
    if not calls:
        return

    what = f"Aggregated by dftracer: {count_text(calls['count'])} calls in {plural(calls['rows'], 'row')}"
    yield Text(f"{what}, not included in other figures", style="dim")
    groups = calls["groups"][:top]
    labels = _labels(groups, result["by"])
    counts = ("count", 11, [count_text(group["count"]) for group in groups])
    times = [(title, 9, [_time(group[key]) for group in groups]) for title, key in _AGGREGATED_TIMES]
    yield from _table(labels, [counts, *times], viewport)
    yield from _not_shown(calls["groups"], top)


def _labels(groups: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[_Column]:
    return [(field, 0, [_label(group[field]) for group in groups]) for field in by]


def _not_shown(groups: Sequence[object], top: int) -> Iterator[Text]:
    if len(groups) > top:
        yield Text(f"and {plural(len(groups) - top, 'more group')}: --top N shows more", style="dim")


def _numbers(rows: Sequence[Mapping[str, Any]], viewport: Viewport) -> list[_Column]:
    """Return the columns of numbers; a narrow screen shows fewer."""
    times = _TIMES if viewport.width >= _WIDE else _TIMES[:4]
    counts = [count_text(row["count"]) for row in rows]
    width = max(5, *(len(count) for count in counts))
    cells = [(title, [_time(row[key]) for row in rows]) for title, key in times]
    return [("count", width, counts), *((title, max(8, *map(len, texts)), texts) for title, texts in cells)]


def _measured(title: str, key: str, rows: Sequence[Mapping[str, Any]]) -> _Column:
    text = _time if key.endswith("_us") else _number
    cells = [text(row[key]) for row in rows]
    return title, max(8, len(title), *map(len, cells)), cells


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _table(labels: Sequence[_Column], numbers: Sequence[_Column], viewport: Viewport) -> Iterator[Text]:
    """Yield a title line and rows; labels share the width that the numbers leave."""
    room = min(viewport.width, _MAX_WIDTH) - sum(width + 1 for _, width, _ in numbers)
    widths = _label_widths(labels, max(room, 8 * len(labels)))
    title = "".join(_cut(text, width, viewport) for (text, _, _), width in zip(labels, widths, strict=True))
    yield Text(title + "".join(f" {text:>{width}}" for text, width, _ in numbers), style="dim")
    for row in range(len(labels[0][2])):
        line = Text(
            "".join(_cut(cells[row], width, viewport) for (_, _, cells), width in zip(labels, widths, strict=True))
        )
        for _, width, cells in numbers:
            line.append(f" {cells[row]:>{width}}")

        yield line


def _label_widths(labels: Sequence[_Column], room: int) -> list[int]:
    wanted = [max(map(cell_len, (title, *cells))) + 1 for title, _, cells in labels]
    while sum(wanted) > room and max(wanted) > 8:
        widest = wanted.index(max(wanted))
        wanted[widest] = max(8, wanted[widest] - (sum(wanted) - room + len(wanted) - 1) // len(wanted))

    return wanted


def _cut(text: str, width: int, viewport: Viewport) -> str:
    if cell_len(text) < width:
        return column_text(text, width)

    ending = viewport.glyphs.ellipsis
    return column_text(text, width - 1 - len(ending)) + ending + " "


def _label(value: Any) -> str:
    return "-" if value is None else printable(str(value))


def _time(us: float | None) -> str:
    return ms_text(None if us is None else us / 1000)


def _overlap(overlap: Mapping[str, Any] | None, viewport: Viewport) -> Iterator[Text]:
    if not overlap or not overlap["duration_us"]:
        return

    total = overlap["duration_us"]
    yield Text(f"Time: {_time(total)}, all files together. Unoverlapped: while nothing computes", style="dim")
    for key, label, style in _KINDS:
        if overlap[key]:
            alone = overlap.get(f"unoverlapped_{key}")
            beside = "" if alone is None else f"  {_time(alone):>8} unoverlapped"
            yield _share_line(label, overlap[key], total, viewport, style).append(beside)

    yield _share_line("none of these", overlap["idle_us"], total, viewport, "bright_black")


def _share_line(label: str, time_us: float, total_us: float, viewport: Viewport, style: str) -> Text:
    width = min(40, max(8, viewport.width - _BESIDE_BAR))
    line = Text(label.ljust(_KIND_LABEL)).append(bar(time_us / total_us, width, viewport, style=style))
    return line.append(f" {percent_text(time_us / total_us):>6} {_time(time_us):>8}")


def _io(io: Mapping[str, Any] | None, viewport: Viewport) -> Iterator[Text]:
    if not io or not io["calls"]:
        return

    rate = f" at {bytes_text(round(io['bytes_per_s']))}/s while any I/O is open" if io["bytes_per_s"] else ""
    yield Text(f"I/O: {bytes_text(io['read_bytes'])} read, {bytes_text(io['write_bytes'])} written{rate}", style="dim")
    calls = io["calls"][:_ROWS]
    names = ("call", 0, [f"{_label(call['cat'])} {_label(call['name'])}" for call in calls])
    counts = ("count", 11, [count_text(call["count"]) for call in calls])
    sums = ("sum", 9, [_time(call["sum_us"]) for call in calls])
    sizes = ("bytes", 9, [bytes_text(call["bytes"]) if call["bytes"] else "-" for call in calls])
    rates = ("per s", 9, [bytes_text(round(call["bytes_per_s"])) if call["bytes"] else "-" for call in calls])
    yield from _table([names], [counts, sums, sizes, rates], viewport)


def _operations(rows: Sequence[Mapping[str, Any]] | None, title: str, key: str, viewport: Viewport) -> Iterator[Text]:
    if not rows:
        return

    yield Text(f"{title}, by {'time' if key == 'sum_us' else 'self time'}", style="dim")
    shown = rows[:_ROWS]
    yield from _table([("name", 0, [_label(row["name"]) for row in shown])], _numbers(shown, viewport), viewport)


def _units(report: Mapping[str, Any], viewport: Viewport) -> Iterator[Text]:
    """Yield ranks where they are known, else processes; nothing for a single one."""
    ranks, processes = report.get("ranks") or [], report.get("processes") or []
    rows = ranks if len(ranks) > 1 else processes
    if len(rows) < 2:
        return

    shown = sorted(rows, key=lambda row: row["rank"] if rows is ranks else -row["duration_us"])[: 2 * _ROWS]
    names = [_unit_name(row, by_rank=rows is ranks) for row in shown]
    labels: list[_Column] = [("rank" if rows is ranks else "process", 0, names)]
    if len(set(names)) < len(names):  # those of containers often have the same number
        labels.append(("file", 0, _file_names([row["file"] for row in shown])))

    times = [(title, 10, [_time(row[key]) for row in shown]) for title, key in _UNIT if any(row[key] for row in shown)]
    room = (min(viewport.width, _MAX_WIDTH) - _UNIT_LABEL * len(labels)) // 11
    yield from _table(labels, times[:room], viewport)
    if len(rows) > len(shown):
        yield Text(f"and {len(rows) - len(shown)} more: --json lists all", style="dim")


def _unit_name(row: Mapping[str, Any], *, by_rank: bool) -> str:
    if by_rank:
        return f"rank {row['rank']}" + (f" ({row['host']})" if row["host"] else "")

    return f"{_label(row['name'] or 'pid')} {_label(row['pid'])}"


def _file_names(paths: Sequence[str]) -> list[str]:
    """Return paths from their common folder on."""
    files = [Path(path).absolute() for path in paths]
    common = os.path.commonpath([file.parent for file in files])
    return [_label(file.relative_to(common)) for file in files]


def _timeline(timeline: Mapping[str, Any] | None, viewport: Viewport) -> Iterator[Text]:
    if not timeline or len(timeline["bins"]) < 2:
        return

    fine = timeline["bins"]
    joined = -(-len(fine) // max(1, viewport.width - _KIND_LABEL))  # on a narrow screen neighbors share a column
    bins = [fine[at : at + joined] for at in range(0, len(fine), joined)]
    yield Text(f"Timeline: {len(bins)} bins of {_time(timeline['bin_us'] * joined)}", style="dim")
    rows = [(key, label, style) for key, label, style in _KINDS if any(each[key] for each in fine)]
    if not rows:
        rows = [("host_us", "host", "cyan"), ("host_comm_us", "communication", "red"), ("other_us", "other", "")]

    for key, label, style in [*rows, ("spans", "spans begun", "")]:
        values = [sum(each[key] for each in column) for column in bins]
        if any(values):
            yield Text(label.ljust(_KIND_LABEL)).append(sparkline(values, len(values), viewport), style=style)
