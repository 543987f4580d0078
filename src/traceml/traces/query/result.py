"""Result of a query about traces as plain data, as printed by `traceml analyze --json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from traceml.formatting import plural
from traceml.traces.aggregate.stats import RELATIVE_ERROR, ArgumentSum, GroupStat, quantile
from traceml.traces.query.analysis import Analysis
from traceml.traces.query.measures import USUAL, Measure
from traceml.traces.reader.columns import FileDamage, TraceFileFacts

__all__ = ["SCHEMA", "merged_groups", "microseconds", "result_of", "stat_row"]

SCHEMA = "traceml.analysis/1"
_EXACT_FLOAT = 2**53
_UNPAIRED = (
    ("begin event", "without an end"),
    ("end event", "without a begin"),
    ("end event", "of a span in which another is open"),
)


def result_of(analysis: Analysis, files: Sequence[TraceFileFacts]) -> dict[str, Any]:
    """Return the result of a finished analysis; all groups, the largest sum first."""
    groups = merged_groups(analysis, len(analysis.query.by))
    order = sorted(groups.items(), key=lambda item: (-item[1].total, [str(label) for label in item[0]]))
    by = list(analysis.query.by)
    return {
        "schema": SCHEMA,
        "files": [_file(facts, damage) for facts, damage in _with_unpaired(analysis, files)],
        "events": analysis.events,
        "spans": analysis.spans,
        "letters": dict(sorted(analysis.phase_counts.items())),
        "by": by,
        "percentile_error": RELATIVE_ERROR,
        "groups": [
            {
                **dict(zip(by, labels, strict=True)),
                **stat_row(stat, fractional=analysis.fractional, measures=analysis.query.measures),
            }
            for labels, stat in order
        ],
    }


def merged_groups(analysis: Analysis, fields: int | slice) -> dict[tuple[Any, ...], GroupStat]:
    """Return the statistics by the labels of some of the query's fields: the first ones, or a slice."""
    chosen = slice(fields) if isinstance(fields, int) else fields
    groups: dict[tuple[Any, ...], GroupStat] = {}
    for number in range(len(analysis.groups[-1])):
        stat = analysis.stat(number)
        if not stat.count:
            continue

        known = groups.setdefault(analysis.labels(number)[chosen], stat)
        if known is not stat:
            known.merge(stat)

    return groups


def stat_row(stat: GroupStat, *, fractional: bool, measures: Sequence[Measure] = ()) -> dict[str, Any]:
    """Return the numbers of one group, in microseconds.

    Args:
        stat: with at least one span.
        fractional: whether the trace has fractions of microseconds; else all times are integers.
        measures: to add to the usual ones.
    """
    assert stat.least is not None
    assert stat.most is not None
    return {
        "count": stat.count,
        "sum_us": microseconds(stat.total, fractional=fractional),
        "mean_us": _ratio(stat.total, stat.count * 1000),
        "min_us": microseconds(stat.least, fractional=fractional),
        "max_us": microseconds(stat.most, fractional=fractional),
        "p50_us": _percentile(stat, Fraction(1, 2), fractional),
        "p99_us": _percentile(stat, Fraction(99, 100), fractional),
        "self_us": microseconds(stat.self_ns, fractional=fractional),
        **{measure.column: _measured(stat, measure, fractional) for measure in measures if measure.name not in USUAL},
    }


def _measured(stat: GroupStat, measure: Measure, fractional: bool) -> int | float | None:
    if measure.arg is not None:
        total = stat.arguments.get(measure.arg, ArgumentSum()).total
        return total if total is None or math.isfinite(total) else None  # JSON has no other numbers

    if measure.quantile is not None:
        return _percentile(stat, measure.quantile, fractional)

    if stat.count < 2:
        return None

    variance = _ratio(stat.count * stat.squares - stat.total**2, stat.count * (stat.count - 1) * 10**6)
    if measure.name == "var":
        return variance

    return math.isqrt(variance) if isinstance(variance, int) else math.sqrt(variance)


def microseconds(time_ns: int, *, fractional: bool) -> int | float:
    """Return nanoseconds as microseconds: an integer if that is exact and the trace has integers."""
    if not fractional and time_ns % 1000 == 0:
        return time_ns // 1000

    whole = time_ns % 1000 == 0 and not -_EXACT_FLOAT * 1000 < time_ns < _EXACT_FLOAT * 1000
    return time_ns // 1000 if whole else _ratio(time_ns, 1000)


def _percentile(stat: GroupStat, share: Fraction, fractional: bool) -> int | float:
    assert stat.least is not None
    assert stat.most is not None
    if -(-share.numerator * stat.count // share.denominator) == stat.count:
        return microseconds(stat.most, fractional=fractional)  # exact

    middle = quantile(stat.counts, share, stat.count)
    value: int = middle if fractional else (2 * middle + 1000) // 2000 * 1000
    if value < stat.least:
        value = stat.least
    elif value > stat.most:
        value = stat.most

    return microseconds(value, fractional=fractional)


def _ratio(value: int, by: int) -> int | float:
    try:
        return value / by
    except OverflowError:
        return value // by  # no float is that large, and JSON has no infinity


def _with_unpaired(
    analysis: Analysis, files: Sequence[TraceFileFacts]
) -> Iterable[tuple[TraceFileFacts, list[FileDamage]]]:
    for source, facts in enumerate(files):
        damage = list(facts.damage)
        lost = analysis.unpaired.get(source)
        counts = (lost.begins, lost.ends, lost.crossed) if lost is not None else ()
        damage += [
            FileDamage(0, f"{plural(count, event)} {what}", 0)
            for (event, what), count in zip(_UNPAIRED, counts, strict=False)
            if count
        ]
        yield facts, damage


def _file(facts: TraceFileFacts, damage: Sequence[FileDamage]) -> Mapping[str, Any]:
    return {
        "path": str(facts.path),
        "events": facts.events,
        "bytes": facts.bytes,
        "damage": [{"offset": each.offset, "what": each.what, "lost_bytes": each.lost_bytes} for each in damage],
    }
