"""Parser of conditions: `cat=POSIX,dur>100`, `NOT (name~read OR name IN (open, close))`.

Parts between commas must all hold. Within a part NOT binds closest, then AND, then OR. A value that is not quoted ends
at a comma, at the parenthesis around it, or before a word (AND, OR) that another condition follows: `name=this or that`
is one comparison.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

from traceml.errors import UsageError
from traceml.traces.query.expressions import (
    FIELDS,
    MEASURES,
    AllOf,
    AnyOf,
    Condition,
    Expression,
    Negation,
    check_field,
    unquoted,
)

__all__ = ["parse_where"]

_OPERATORS = ("!=", "<>", "<=", ">=", "==", "=~", "=", "<", ">", "~")
_SPELLINGS = {"==": "=", "<>": "!=", "=~": "~"}  # as in programming languages, SQL, and queries of logs
_FIELD = re.compile(r"\s*([A-Za-z_][\w.:/-]*)\s*")
_OPERATOR = re.compile("|".join(re.escape(operator) for operator in _OPERATORS))
_QUOTED = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""")
_SPACE = re.compile(r"\s*")
_NOT = re.compile(r"\s*(?:not(?=[\s(])|!(?!=))", re.IGNORECASE)
_AND = re.compile(r"\s+and(?=[\s(])|\s*&&?", re.IGNORECASE)
_OR = re.compile(r"\s+or(?=[\s(])|\s*\|\|?", re.IGNORECASE)
_WORDS = (_AND, _OR)
_IN = re.compile(r"(not\s+)?in\s*\(", re.IGNORECASE)
_ARG = r"args\.[\w.:/-]+"
# After AND or OR: another condition. Else these characters belong to the value.
_BEGINS = re.compile(
    rf"(?:\s|\(|!(?!=)|not(?=[\s(]))*(?:{'|'.join((*FIELDS, *MEASURES))}|{_ARG})"
    rf"\s*(?:{_OPERATOR.pattern}|(?:not\s+)?in\s*\()",
    re.IGNORECASE,
)
# Within a value: nobody means it as text. A field that does not exist would otherwise match nothing, silently.
_NO_CONDITION = re.compile(
    rf"\s(?:and(?![^\s(])|or(?![^\s(])|&&?\s)[\s(]*(?:$|[A-Za-z_][\w.:/-]*\s*(?:{_OPERATOR.pattern}))", re.IGNORECASE
)
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)$")
_TIMES: dict[str, int | Fraction] = {"": 1, "us": 1, "ns": Fraction(1, 1000), "ms": 1000, "s": 10**6}
_SIZES: dict[str, int | Fraction] = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZES |= {
    f"{unit}{end}": base**power for power, unit in enumerate("kmgt", 1) for end, base in (("b", 1000), ("ib", 1024))
}
_MAX_DEPTH = 50
_Parse = Callable[[], Expression]
Parsed = TypeVar("Parsed")


def parse_where(text: str) -> tuple[Expression, ...]:
    """Return the conditions of `cat=POSIX,dur>100`; all of them must hold.

    Raises:
        UsageError: the text is not valid; the error points to the position.
    """
    return _ConditionParser(text).parts() if text.strip() else ()


class _ConditionParser:
    """Recursive descent over the text of a query."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._depth = self._parentheses = 0

    def parts(self) -> tuple[Expression, ...]:
        """Return the parts between commas."""
        found = _sequence(self._any, lambda: self._takes(","))
        if self._text[self._at :].strip():
            raise self._misread("a comma, AND or OR is expected")

        return found

    def _any(self) -> Expression:
        parts = _sequence(self._all, lambda: self._joins(_OR))
        return parts[0] if len(parts) == 1 else AnyOf(parts)

    def _all(self) -> Expression:
        parts = _sequence(self._one, lambda: self._joins(_AND))
        return parts[0] if len(parts) == 1 else AllOf(parts)

    def _one(self) -> Expression:
        if negated := _NOT.match(self._text, self._at):
            self._at = negated.end()
            return Negation(self._nested(self._one))

        return self._nested(self._group) if self._takes("(") else self._comparison()

    def _group(self) -> Expression:
        self._parentheses += 1
        parts = _sequence(self._any, lambda: self._takes(","))
        self._close()
        return parts[0] if len(parts) == 1 else AllOf(parts)

    def _nested(self, parse: _Parse) -> Expression:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._misread(f"at most {_MAX_DEPTH} levels of NOT and parentheses are expected")

        found = parse()
        self._depth -= 1
        return found

    # ---- comparisons ----

    def _comparison(self) -> Expression:
        field = _FIELD.match(self._text, self._at)
        if field is None:
            raise self._misread("a field is expected")

        self._at = field.end()
        if listed := _IN.match(self._text, self._at):
            check_field(field[1], "where", measures=True)
            self._at = listed.end()
            found = AnyOf(self._alternatives(field[1]))
            return Negation(found) if listed[1] else found

        found_symbol = _OPERATOR.match(self._text, self._at)
        if found_symbol is None:
            raise self._misread("one of != <= >= = < > ~ or IN (...) is expected")

        check_field(field[1], "where", measures=True)
        self._at = found_symbol.end()
        symbol = _SPELLINGS.get(found_symbol[0], found_symbol[0])
        return self._compared(field[1], symbol, self._value(symbol))

    def _alternatives(self, field: str) -> tuple[Condition, ...]:
        self._parentheses += 1
        found = _sequence(lambda: self._compared(field, "=", self._item()), lambda: self._takes(","))
        self._close()
        return found

    def _compared(self, field: str, symbol: str, value: tuple[str, bool, int]) -> Condition:
        text, quoted, at = value
        parts = None if quoted else _NUMBER.match(text)
        unit = (_TIMES if field in MEASURES else _SIZES).get(parts[2].lower()) if parts else None
        number = Fraction(parts[1]) * unit if parts and unit else _quoted_number(text) if quoted else None
        if field in MEASURES and (number is None or symbol == "~"):
            self._at = at
            raise self._misread(f"{field} is compared with a number of microseconds, such as 100 or 2.5ms")

        if parts and unit is None and symbol[0] in "<>":
            self._at = at
            raise self._misread("a number is expected, or one with a unit of size, such as 4KiB or 1.5MB")

        return Condition(field, symbol, text, number)

    # ---- values: text, whether it was quoted, and its position ----

    def _value(self, symbol: str) -> tuple[str, bool, int]:
        value, quoted, at = self._item()
        if not quoted and symbol != "~" and "|" in value:
            self._at = at
            raise self._misread("one value is expected: write IN (a, b) for several, and quote a value with |")

        return value, quoted, at

    def _item(self) -> tuple[str, bool, int]:
        at = self._at
        quoted = self._quoted()
        return (self._plain(), False, at) if quoted is None else (quoted, True, at)

    def _quoted(self) -> str | None:
        found = _QUOTED.match(self._text, self._at)
        if found is None:
            return None

        self._at = found.end()
        if not self._ends(self._at):
            raise self._misread("a comma, AND or OR is expected")

        inner = found[1] if found[1] is not None else found[2]
        return re.sub(r"\\(.)", r"\1", inner)

    def _plain(self) -> str:
        """Read a value without quotes; a pair of parentheses in it belongs to it."""
        start = at = self._at
        inside = 0
        while at < len(self._text) and (inside or not self._ends(at)):
            if self._text[at] == ",":
                break  # a comma ends a value even inside its parentheses

            inside = max(0, inside + {"(": 1, ")": -1}.get(self._text[at], 0))

            at += 2 if self._text[at] == "\\" and self._text[at + 1 : at + 2] == "," else 1

        value = self._text[start:at].replace("\\,", ",").strip()
        if not value:
            raise self._misread("a value is expected")

        if joined := _NO_CONDITION.search(self._text[start:at]):
            self._at = start + joined.start()
            raise self._misread("another condition is expected after AND or OR, or quotes around the value,")

        self._at = at
        return value

    def _ends(self, at: int) -> bool:
        """Return whether a value ends at a position."""
        rest = _SPACE.match(self._text, at)
        assert rest is not None
        following = self._text[rest.end() : rest.end() + 1]
        if following in ("", ",") or (following == ")" and self._parentheses > 0):
            return True

        return any((found := word.match(self._text, at)) and _BEGINS.match(self._text, found.end()) for word in _WORDS)

    # ---- text ----

    def _close(self) -> None:
        if not self._takes(")"):
            raise self._misread("a comma or a closing parenthesis is expected")

        self._parentheses -= 1

    def _joins(self, word: re.Pattern[str]) -> bool:
        found = word.match(self._text, self._at)
        if found is not None:
            self._at = found.end()

        return found is not None

    def _takes(self, character: str) -> bool:
        at = _SPACE.match(self._text, self._at)
        assert at is not None
        if not self._text.startswith(character, at.end()):
            return False

        self._at = at.end() + 1
        return True

    def _misread(self, expected: str) -> UsageError:
        text, at = self._text, self._at
        return UsageError(f"where: {expected} at character {at + 1}: {text[:at]} -> HERE -> {text[at:]}".rstrip())


def _quoted_number(text: str) -> Fraction | None:
    """Return the number that a text in quotes is; None for any other text."""
    value = unquoted(text)
    return None if isinstance(value, str) else Fraction(value)


def _sequence(parse: Callable[[], Parsed], continues: Callable[[], bool]) -> tuple[Parsed, ...]:
    found = [parse()]
    while continues():
        found.append(parse())

    return tuple(found)
