"""One event, from what JSON says to what the columns hold: the rules that both scanners keep."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

from traceml.traces.reader.columns import FLOAT, INTEGER, MISSING, NO_TIME, TEXT, StringTable

__all__ = [
    "ASYNC_KINDS",
    "ArgValue",
    "EventRow",
    "NotAnEventError",
    "as_text",
    "exact_event",
    "is_metadata",
    "printable",
]

ASYNC_KINDS = frozenset("bensftNOD")  # kinds of which the `id` tells what belongs together
_INTEGER_KINDS = {1: "X", 4: "M"}  # dftracer writes numbers
MICROSECONDS = 3  # decimals of a time that make it nanoseconds
_LIMIT_NS = 2**63
_MAX_DIGITS = 30  # before or after the point: beyond, a number is taken as it is, never expanded
_TIME_DIGITS = 300  # the same of a time: beyond, it is none, since it could not be computed with

ArgValue = tuple[int, int, float, int]  # kind, integer, float, text: one row of an ArgColumn
# ph, name, cat, pid, tid, id, ts_ns, dur_ns, fractional, args
EventRow = tuple[int, int, int, int, int, int, int, int, bool, list[ArgValue]]


class NotAnEventError(ValueError):
    """An object that is no trace event: it has no kind (`ph`)."""


def exact_event(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as `Batch.odd` and `Batch.meta` deliver it: the kind a letter, times numbers, texts printable.

    Raises:
        NotAnEventError: it has no kind.
    """
    clean: dict[str, Any] = _clean(event)
    clean["ph"] = _kind(event.get("ph"))
    for key in ("ts", "dur"):
        if key in clean:
            clean[key] = _number(clean[key])

    return clean


def is_metadata(event: dict[str, Any]) -> bool:
    """Tell whether an event describes others instead of being one."""
    return bool(event["ph"] == "M")


class RowBuilder:
    """How events of a file become rows.

    Args:
        keys: the keys of `args` that were asked for.
        strings: where names get their numbers.

    Attributes:
        decimals: of a time as the file has it that make it nanoseconds: 3 where times are microseconds.
    """

    def __init__(self, keys: tuple[str, ...], strings: StringTable) -> None:
        self._keys, self._strings = keys, strings
        self.decimals = MICROSECONDS

    def row_of(self, event: dict[str, Any]) -> EventRow | None:
        """Return the event, as `exact_event` returns it, as a row; None when it does not fit in columns exactly."""
        ts, dur = event.get("ts"), event.get("dur")
        ts_ns, dur_ns = _ns(ts, NO_TIME, self.decimals), _ns(dur, -1, self.decimals)
        if ts_ns is None or dur_ns is None or (dur is not None and dur_ns < 0):
            return None

        args = event.get("args")
        values = [_arg(args.get(key) if isinstance(args, dict) else None, self._strings) for key in self._keys]
        if None in values:
            return None

        intern = self._strings.intern
        name, cat, pid, tid = (intern(as_text(event.get(key))) for key in ("name", "cat", "pid", "tid"))
        kind = event["ph"]
        number = intern(as_text(_id_of(event))) if kind in ASYNC_KINDS else -1
        fractional = isinstance(ts, Decimal) or isinstance(dur, Decimal)
        known = [value for value in values if value is not None]
        return ord(kind), name, cat, pid, tid, number, ts_ns, dur_ns, fractional, known

    def in_microseconds(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return the event with its times in microseconds, whatever they are in the file."""
        if self.decimals == MICROSECONDS:
            return event

        times = {key: event[key] for key in ("ts", "dur") if event.get(key) is not None}
        return event | {key: Decimal(value).scaleb(self.decimals - MICROSECONDS) for key, value in times.items()}


def as_text(value: Any) -> str | int | None:
    """Return a name, process or thread as the value that groups are made of."""
    if value is None or type(value) is int or isinstance(value, str):
        return value

    if isinstance(value, Decimal):
        whole = value.is_finite() and abs(value.adjusted()) < _MAX_DIGITS and value == value.to_integral_value()
        return int(value) if whole else str(value)

    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def _kind(ph: Any) -> str:
    if isinstance(ph, str) and len(ph) == 1 and 0x20 < ord(ph) < 0x7F:
        return ph

    if type(ph) is int:
        return _INTEGER_KINDS.get(ph, "?")

    raise NotAnEventError("an object without a kind (ph)")


def _id_of(event: dict[str, Any]) -> Any:
    known = event.get("id")
    more = event.get("id2")
    if known is None and isinstance(more, dict):
        return more.get("local", more.get("global"))

    return known


def _number(value: Any) -> int | Decimal | None:
    """Return a time as a number; some writers put it in quotes. What is no number is no time."""
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


def _ns(value: int | Decimal | None, missing: int, decimals: int) -> int | None:
    """Return a time as nanoseconds; None when that is not exact in 64 bits."""
    if value is None:
        return missing

    scale = 10**decimals
    if isinstance(value, Decimal):
        if not value.is_finite() or (value and abs(value.adjusted()) > _MAX_DIGITS):
            return None

        exact = Fraction(value) * scale
        ns = exact.numerator if exact.denominator == 1 else _LIMIT_NS
    else:
        ns = value * scale

    return ns if -_LIMIT_NS < ns < _LIMIT_NS else None


def _arg(value: Any, strings: StringTable) -> ArgValue | None:
    """Return a value of `args` as a row of its column; None when it does not fit."""
    if value is None:
        return MISSING, 0, float("nan"), -1

    if type(value) is int:
        return (INTEGER, value, float(value), -1) if -_LIMIT_NS <= value < _LIMIT_NS else None

    if isinstance(value, Decimal):
        return FLOAT, 0, float(value), -1

    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return TEXT, 0, float("nan"), strings.intern(text)


def printable(text: str) -> str:
    """Return a text that can be encoded: bytes that are no UTF-8, and lone surrogates, are shown by their numbers."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _clean(value: Any) -> Any:
    """Return the value with every text in it printable."""
    if isinstance(value, str):
        return printable(value)

    if isinstance(value, dict):
        return {_clean(key): _clean(known) for key, known in value.items()}

    return [_clean(known) for known in value] if isinstance(value, list) else value
