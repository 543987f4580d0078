"""Events whose numbers fit in no column: taken one by one, in exact arithmetic.

Their times have more than three decimals, lie beyond 64 bits, or are negative or not finite. In nesting they take
part to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from traceml.traces.aggregate.stats import Time
from traceml.traces.aggregate.work_kinds import classify
from traceml.traces.query.analysis import FAR_NS, PASSED, ROLES, Analysis, EventRole

__all__ = ["feed_odd", "nanoseconds"]

_EDGE_TYPES = (np.int64, np.uint8, np.int32, np.int32, np.int32, np.uint8)
_SPAN_TYPES = (np.int64, np.int64, np.int32, np.int32, np.uint8)


def feed_odd(analysis: Analysis, event: Mapping[str, Any], source: int) -> None:
    """Take one event of the file number `source`."""
    letter = str(event.get("ph"))
    analysis.letters[letter] += 1
    analysis.fractional = analysis.fractional or any(isinstance(event.get(key), Decimal) for key in ("ts", "dur"))
    role = int(ROLES[ord(letter)]) if len(letter) == 1 and ord(letter) < len(ROLES) else EventRole.POINT
    if role > EventRole.SPAN:
        _feed_edge(analysis, event, source, role)
        return

    if analysis.filter and not analysis.filter.keeps(event, source):
        return

    analysis.events += 1
    if role == EventRole.SPAN:
        _feed_span(analysis, event, source)


def nanoseconds(microseconds: Any) -> Time | None:
    """Return a time as exact nanoseconds; None for what is no number, or not finite."""
    if isinstance(microseconds, int):
        return microseconds * 1000

    if not isinstance(microseconds, Decimal) or not microseconds.is_finite():
        return None

    exact = Fraction(microseconds) * 1000
    return exact.numerator if exact.denominator == 1 else exact


def _feed_span(analysis: Analysis, event: Mapping[str, Any], source: int) -> None:
    group = _group(analysis, event, source)
    start = nanoseconds(event.get("ts"))
    duration: Time = nanoseconds(event.get("dur")) or 0
    stat = analysis.odd(group)
    stat.add(duration)
    analysis.spans += 1
    if start is None or not _near(start) or not (_near(duration) and duration >= 0):
        stat.self_ns += max(duration, 0)
        return

    stat.self_ns += duration - round(duration)
    values = (round(start), round(duration), group, _lane(analysis, event, source), _kind(analysis, event))
    analysis.sorter.add(*(np.array([value], kind) for value, kind in zip(values, _SPAN_TYPES, strict=True)))


def _feed_edge(analysis: Analysis, event: Mapping[str, Any], source: int, role: int) -> None:
    at = nanoseconds(event.get("ts"))
    if at is None or not _near(at):
        return

    strings = analysis.origin.strings
    lane = _lane(analysis, event, source)
    if role >= EventRole.ASYNC_BEGIN:
        number = analysis.asynchronous.one(strings.intern(event.get("cat")), strings.intern(event.get("id")))
        lane = analysis.lanes.one(-2 - source, number)

    passed = not analysis.filter or analysis.filter.keeps(event, source, timed=False)
    mark = _kind(analysis, event) | (PASSED if passed else 0)
    is_end, name = role in (EventRole.END, EventRole.ASYNC_END), strings.intern(event.get("name"))
    values = (round(at), is_end, lane, name, _group(analysis, event, source), mark)
    analysis.matcher.add(*(np.array([value], kind) for value, kind in zip(values, _EDGE_TYPES, strict=True)))


def _near(time_ns: Time) -> bool:
    return -FAR_NS < time_ns < FAR_NS


def _group(analysis: Analysis, event: Mapping[str, Any], source: int) -> int:
    group = 0
    for field, numbering in zip(analysis.fields, analysis.groups, strict=True):
        group = numbering.one(group, field.one(event, source))

    return group


def _lane(analysis: Analysis, event: Mapping[str, Any], source: int) -> int:
    strings = analysis.origin.strings
    process = analysis.origin.processes.one(source, strings.intern(event.get("pid")))
    return analysis.lanes.one(process, strings.intern(event.get("tid")))


def _kind(analysis: Analysis, event: Mapping[str, Any]) -> int:
    return classify(event.get("cat"), event.get("name")) if analysis.question.report else 0
