"""Conditions and fields of queries: comparisons, joined by AND, OR and NOT."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from traceml.errors import UsageError

__all__ = [
    "ARGS", "FIELDS", "MEASURES", "AllOf", "AnyOf", "Condition", "Expression", "Negation", "check_field",
    "comparisons", "parse_by", "unquoted",
]  # fmt: skip

FIELDS = ("name", "cat", "pid", "tid", "rank", "host", "file", "source", "ph")
MEASURES = ("ts", "dur")  # microseconds; in conditions only
ARGS = "args."

_INTEGER = r"-?(?:0|[1-9][0-9]{0,30})"
_QUOTED_NUMBER = re.compile(rf"(?P<integer>{_INTEGER})(?:\.[0-9]{{1,30}})?(?:[eE][+-]?[0-9]{{1,2}})?")
_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a field with a value."""

    field: str  # as in FIELDS or MEASURES, or `args.<key>`
    operator: str  # one of = != < <= > >= ~
    value: str  # as written, without its quotes
    # The value as a number, times in microseconds and sizes in bytes; None if it is not a number.
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
        return value == self.value or (self.number is not None and unquoted(value) == self.number)

    def _orders(self, value: Any) -> bool:
        limit = self.value if self.number is None else self.number
        value = value if self.number is None else unquoted(value)
        if isinstance(value, str) != isinstance(limit, str):
            return False  # a text is neither more nor less than a number

        return bool(_ORDERS[self.operator](value, limit))


@dataclass(frozen=True, slots=True)
class AllOf:
    """Conditions that must all hold."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Conditions of which one must hold."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Negation:
    """A condition that must not hold. An event without the field passes, unless the condition accepts it (`!=`)."""

    part: Expression


Expression = Condition | AllOf | AnyOf | Negation


def unquoted(value: Any) -> Any:
    """Return a value, as a number if it is one in quotes: dftracer 1 writes `"ret":"4096"`; a Fraction is not whole."""
    found = _QUOTED_NUMBER.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value

    return int(value) if found["integer"] == value else Fraction(value)


def comparisons(expression: Expression) -> Iterator[Condition]:
    """Yield all comparisons in an expression."""
    if isinstance(expression, Condition):
        yield expression
    elif isinstance(expression, Negation):
        yield from comparisons(expression.part)
    else:
        for part in expression.parts:
            yield from comparisons(part)


def parse_by(text: str) -> tuple[str, ...]:
    """Return the fields of `name,args.size`.

    Raises:
        UsageError: there is no such field, or none at all.
    """
    fields = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not fields:
        raise UsageError(f"by: no field in {text!r}. Fields: {_all_fields()}")

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

    from difflib import get_close_matches

    close = get_close_matches(field, known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(f"{where}: there is no field {field!r}.{meant} Fields: {_all_fields(measures=measures)}")


def _all_fields(*, measures: bool = False) -> str:
    """Return the names of all fields, as errors list them."""
    return ", ".join((*FIELDS, *(MEASURES if measures else ()), "args.<key>"))
