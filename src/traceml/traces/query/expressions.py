"""Syntax of queries: fields, and conditions like `cat=POSIX,dur>100`."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

from traceml.errors import UsageError

__all__ = ["ARGS", "FIELDS", "MEASURES", "Condition", "check_field", "parse_by", "parse_where"]

FIELDS = ("name", "cat", "pid", "tid", "rank", "host", "file", "source", "ph")
MEASURES = ("ts", "dur")  # microseconds; in conditions only
ARGS = "args."

_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_OPERATORS = ("!=", "<=", ">=", "==", "=", "<", ">", "~")
_SPELLINGS = {"==": "="}  # as in programming languages
_FIELD = re.compile(r"\s*([A-Za-z_][\w.:/-]*)\s*")
_OPERATOR = re.compile("|".join(re.escape(operator) for operator in _OPERATORS))
_QUOTED = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*(?=,|$)""")
_PLAIN = re.compile(r"(?:[^,\\]|\\.)*")
_NEXT = rf"\s*(?:{'|'.join((*FIELDS, *MEASURES))}|args\.[\w.:/-]+)\s*(?:{_OPERATOR.pattern})"
_JOINED = re.compile(rf"(?:\||&|\s(?:or|and)\s){_NEXT}", re.IGNORECASE)  # another condition within a value
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)$")
_NO_OR = "one value is expected (several as in cat~'^(POSIX|STDIO)$', conditions by commas, a value with | in quotes)"
_TIMES = {"": 1, "us": 1, "ns": Fraction(1, 1000), "ms": 1000, "s": 10**6}
_SIZES = {"b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
_UNITS = {**_TIMES, **_SIZES, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a field with a value.

    Args:
        field: as in FIELDS or MEASURES, or `args.<key>`.
        operator: one of = != < <= > >= ~
        value: as written, without its quotes.
        number: the value as a number, times in microseconds and sizes in bytes; None if it is not a number.
    """

    field: str
    operator: str
    value: str
    number: Fraction | None

    def accepts(self, value: Any) -> bool:
        """Return whether a field with this value passes; None is an event without the field."""
        if value is None:
            return self.operator == "!="

        if self.operator in ("=", "!="):
            return self._equals(value) == (self.operator == "=")

        if self.operator == "~":
            return self.matcher()(str(value))

        return self._orders(value)

    def matcher(self) -> Callable[[str], bool]:
        """Return the test of `~`: a regular expression found anywhere, or a shell pattern for the whole text."""
        try:
            found = re.compile(self.value).search
        except re.error:
            found = re.compile(fnmatch.translate(self.value)).match

        return lambda text: found(text) is not None

    def _equals(self, value: Any) -> bool:
        if isinstance(value, str):
            return value == self.value

        return self.number is not None and value == self.number

    def _orders(self, value: Any) -> bool:
        if self.number is None or isinstance(value, str):
            return bool(_ORDERS[self.operator](str(value), self.value))

        return bool(_ORDERS[self.operator](value, self.number))


def parse_by(text: str) -> tuple[str, ...]:
    """Return the fields of `name,args.size`.

    Raises:
        UsageError: there is no such field, or none at all.
    """
    fields = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not fields:
        raise UsageError(f"by: no field in {text!r}. There are {_all_fields()}")

    for field in fields:
        check_field(field, "by")

    return fields


def check_field(field: str, where: str, *, measures: bool = False) -> None:
    """Refuse a field that events do not have.

    Raises:
        UsageError: with the fields that there are.
    """
    known = (*FIELDS, *MEASURES) if measures else FIELDS
    if field in known or (field.startswith(ARGS) and len(field) > len(ARGS)):
        return

    close = get_close_matches(field, known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(f"{where}: there is no field {field!r}.{meant} There are {_all_fields(measures)}")


def parse_where(text: str) -> tuple[Condition, ...]:
    """Return the conditions of `cat=POSIX,dur>100`; all of them must hold.

    Raises:
        UsageError: the text is not valid; the error points to the position.
    """
    conditions: list[Condition] = []
    at = 0 if text.strip() else len(text) + 1
    while at <= len(text):
        condition, at = _condition(text, at)
        conditions.append(condition)

    return tuple(conditions)


def _condition(text: str, at: int) -> tuple[Condition, int]:
    field = _FIELD.match(text, at)
    if field is None:
        raise _misread(text, at, "a field is expected")

    symbol = _OPERATOR.match(text, field.end())
    if symbol is None:
        raise _misread(text, field.end(), "one of != <= >= = < > ~ is expected")

    check_field(field[1], "where", measures=True)
    value, quoted, end = _value(text, symbol.end())
    if not value and not quoted:
        raise _misread(text, symbol.end(), "a value is expected")

    alternatives = "|" in value and symbol[0] != "~"
    if not quoted and (alternatives or _JOINED.search(value)):
        raise _misread(text, symbol.end(), _NO_OR)

    number = None if quoted else _number(value)
    if field[1] in MEASURES and (number is None or symbol[0] == "~"):
        raise _misread(text, symbol.end(), f"{field[1]} is compared with a number of microseconds, as 100 or 2.5ms")

    return Condition(field[1], _SPELLINGS.get(symbol[0], symbol[0]), value, number), end + 1


def _value(text: str, at: int) -> tuple[str, bool, int]:
    if quoted := _QUOTED.match(text, at):
        inner = quoted[1] if quoted[1] is not None else quoted[2]
        return re.sub(r"\\(.)", r"\1", inner), True, quoted.end()

    plain = _PLAIN.match(text, at)
    assert plain is not None
    return plain[0].replace("\\,", ",").strip(), False, plain.end()


def _number(value: str) -> Fraction | None:
    parts = _NUMBER.match(value)
    if parts is None or parts[2].lower() not in _UNITS:
        return None

    return Fraction(parts[1]) * _UNITS[parts[2].lower()]


def _misread(text: str, at: int, expected: str) -> UsageError:
    return UsageError(f"where: {expected} at character {at + 1}: {text[:at]} -> HERE -> {text[at:]}".rstrip())


def _all_fields(measures: bool = False) -> str:
    return ", ".join((*FIELDS, *(MEASURES if measures else ()), "args.<key>"))
