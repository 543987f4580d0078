"""Conversion of one event from JSON to the values of the columns, for both scanners."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

from traceml.traces.reader.columns import FLOAT, INTEGER, MISSING, NO_TIME, TEXT, ExactTimes, StringTable

__all__ = [
    "AGGREGATED",
    "ArgValue",
    "EventRow",
    "NotAnEventError",
    "cleaned",
    "encodable",
]

AGGREGATED = "A"  # dftracer's phase code of a row with the number and the sum of many calls
_ASYNC_PHASES = frozenset("bensftNODSTpF")  # phase codes of events that belong together by `id`
_INTEGER_PHASES = {1: "X", 3: AGGREGATED, 4: "M"}  # dftracer writes numbers
MICROSECONDS = 3  # decimals of a time in microseconds that make it nanoseconds
_LIMIT_NS = 2**63
_MAX_DIGITS = 30  # before or after the point: a longer number is kept as it is, never expanded
_TIME_DIGITS = 300  # the same of a time: a longer one is ignored, since it cannot be used in computations

ArgValue = tuple[int, int, float, int]  # kind, integer, float, text: one row of an ArgColumn
# ph, name, cat, pid, tid, id, ts_ns, dur_ns, fractional, args, exact
EventRow = tuple[int, int, int, int, int, int, int, int, bool, list[ArgValue], ExactTimes | None]


class NotAnEventError(ValueError):
    """An object that is not a trace event: it has no phase code (`ph`)."""


def cleaned(event: dict[str, Any], *, plain: bool = False) -> dict[str, Any]:
    """Return an event as in `EventBatch.metadata`: `ph` a str, times numbers, texts encodable.

    Args:
        event: the event, which may be changed.
        plain: all its texts are encodable.

    Raises:
        NotAnEventError: it has no phase code.
    """
    clean: dict[str, Any] = event if plain else _clean(event)
    clean["ph"] = _phase(event.get("ph"))
    for key in ("ts", "dur"):
        if key in clean:
            clean[key] = _number(clean[key])

    return clean


class RowBuilder:
    """Makes rows of the events of a file.

    Attributes:
        decimals: decimals of a time in the file that make it nanoseconds: 3 where times are microseconds.
    """

    def __init__(self, keys: tuple[str, ...], strings: StringTable) -> None:
        self._keys, self._strings = keys, strings
        self.decimals = MICROSECONDS

    def row_of(self, event: dict[str, Any]) -> EventRow:
        """Return an event, as returned by `cleaned`, as a row."""
        ts, dur = event.get("ts"), event.get("dur")
        exact = _ns(ts, self.decimals), _ns(dur, self.decimals)
        ts_ns, dur_ns = _fitting(exact[0], NO_TIME), _fitting(exact[1], -1)
        fits = exact == (None if ts is None else ts_ns, None if dur is None else dur_ns) and (
            dur is None or dur_ns >= 0
        )

        args = event.get("args")
        values = [_arg(args.get(key) if isinstance(args, dict) else None, self._strings) for key in self._keys]
        intern = self._strings.intern
        name, cat, pid, tid = (intern(_as_text(event.get(key))) for key in ("name", "cat", "pid", "tid"))
        phase = event["ph"]
        number = intern(_as_text(_id_of(event))) if phase in _ASYNC_PHASES else -1
        fractional = isinstance(ts, Decimal) or isinstance(dur, Decimal)
        return ord(phase), name, cat, pid, tid, number, ts_ns, dur_ns, fractional, values, None if fits else exact


def _as_text(value: Any) -> str | int | None:
    """Return a name, process or thread as a value to group by."""
    if value is None or type(value) is int or isinstance(value, str):
        return value

    if isinstance(value, Decimal):
        whole = value.is_finite() and abs(value.adjusted()) < _MAX_DIGITS and value == value.to_integral_value()
        return int(value) if whole else str(value)

    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def _phase(ph: Any) -> str:
    if isinstance(ph, str) and len(ph) == 1 and 0x20 < ord(ph) < 0x7F:
        return ph

    if type(ph) is int:
        return _INTEGER_PHASES.get(ph, "?")

    raise NotAnEventError("an object without a phase code (ph)")


def _id_of(event: dict[str, Any]) -> Any:
    known = event.get("id")
    more = event.get("id2")
    if known is None and isinstance(more, dict):
        local = more.get("local")  # known to its process only
        return more.get("global") if local is None else f"{_as_text(event.get('pid'))}/{_as_text(local)}"

    return known


def _number(value: Any) -> int | Decimal | None:
    """Return a time as a number, None for anything else; some writers put it in quotes."""
    if isinstance(value, str):
        try:
            value = int(value) if value.lstrip("-").isdecimal() else Decimal(value)
        except (ArithmeticError, ValueError):
            return None

    if type(value) is int:
        return value if abs(value) < 10**_TIME_DIGITS else None

    if not isinstance(value, Decimal) or not value.is_finite():
        return None

    return value if not value or abs(value.adjusted()) <= _TIME_DIGITS else None


def _ns(value: int | Decimal | None, decimals: int) -> int | None:
    """Return a time as nanoseconds, finer ones rounded: half a nanosecond to the even one."""
    if value is None:
        return None

    scale: int = 10**decimals
    return value * scale if isinstance(value, int) else round(Fraction(value) * scale)


def _fitting(time_ns: int | None, missing: int) -> int:
    """Return a time; `missing` when it exceeds 64 bits."""
    return missing if time_ns is None or not -_LIMIT_NS < time_ns < _LIMIT_NS else time_ns


def _arg(value: Any, strings: StringTable) -> ArgValue:
    """Return a value of `args` as a row of its column."""
    if value is None:
        return MISSING, 0, float("nan"), -1

    if type(value) is int and -_LIMIT_NS <= value < _LIMIT_NS:
        return INTEGER, value, float(value), -1

    if isinstance(value, Decimal):
        return FLOAT, 0, float(value), -1

    known = (
        value if isinstance(value, str) or type(value) is int else json.dumps(value, separators=(",", ":"), default=str)
    )
    return TEXT, 0, float("nan"), strings.intern(known)


def encodable(text: str) -> str:
    """Return a text that can be encoded: bytes that are not UTF-8, and lone surrogates, are escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _clean(value: Any) -> Any:
    """Return the value with all texts in it encodable."""
    if isinstance(value, str):
        return encodable(value)

    if isinstance(value, dict):
        return {_clean(key): _clean(known) for key, known in value.items()}

    return [_clean(known) for known in value] if isinstance(value, list) else value
