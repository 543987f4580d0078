"""Fields of events as numbers, for grouping and for conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.numbering import PairNumbering
from traceml.traces.query.expressions import ARGS, unquoted
from traceml.traces.query.labels import Labels
from traceml.traces.reader.columns import FLOAT, INTEGER, TEXT, ArgColumn, EventBatch, StringTable

__all__ = ["ArgField", "EventField", "FieldContext", "args_of", "field_of", "with_quoted"]

_DIRECT = ("name", "cat", "pid", "tid")
# Arguments that derived fields use; the first that an event has.
_DERIVED = {"rank": ("rank",), "host": ("hhash", "hostname"), "file": ("fhash", "fname", "filename")}

Ids = NDArray[np.int32]
Label = str | int | float | None


class FieldContext:
    """State shared by the fields of a query: values, processes, files, and labels from metadata."""

    def __init__(self, strings: StringTable, paths: Sequence[Path], labels: Labels | None = None) -> None:
        self.strings, self.paths, self.labels = strings, paths, labels or Labels()
        self.processes = PairNumbering()  # (file, pid)

    def process(self, number: int) -> tuple[int, Label]:
        """Return the file and the pid of a process."""
        source, pid = self.processes.pair(number)
        return source, self.strings[pid]


def args_of(fields: list[str]) -> list[str]:
    """Return the keys of `args` that fields use."""
    keys: list[str] = []
    for field in fields:
        keys += [field.removeprefix(ARGS)] if field.startswith(ARGS) else _DERIVED.get(field, ())

    return list(dict.fromkeys(keys))


def with_quoted(column: ArgColumn, strings: StringTable) -> ArgColumn:
    """Return a column in which numbers in quotes are numbers, apart from integers that exceed 64 bits."""
    texts = np.flatnonzero(column.kinds == TEXT)
    distinct, where = np.unique(column.texts[texts], return_inverse=True)
    values = [unquoted(strings[number]) for number in distinct.tolist()]
    if all(isinstance(value, str) for value in values):
        return column

    kinds, integers, floats = column.kinds.copy(), column.integers.copy(), column.floats.copy()
    fits = [isinstance(value, int) and abs(value) < 2**63 for value in values]
    for kind, numbers, fit in (
        (INTEGER, integers, fits),
        (FLOAT, floats, [isinstance(value, Fraction) for value in values]),
    ):
        rows = texts[np.array(fit)[where]]
        kinds[rows] = kind
        chosen = np.array([value if one else 0 for value, one in zip(values, fit, strict=True)], numbers.dtype)
        numbers[rows] = chosen[where][np.array(fit)[where]]

    return ArgColumn(kinds, integers, floats, column.texts)


def field_of(name: str, context: FieldContext) -> EventField:
    """Return the field with a name of traceml.traces.query.expressions."""
    if name in _DIRECT:
        return _DirectField(name, context)

    if name.startswith(ARGS):
        return ArgField(name.removeprefix(ARGS), context)

    if name in _DERIVED:
        return _DerivedField(name, context)

    return _KindField(context) if name == "ph" else _SourceField(context)


class _Numbered:
    """A field with the numbers of StringTable."""

    def __init__(self, context: FieldContext) -> None:
        self._strings = context.strings

    def label(self, number: int) -> Label:
        return self._strings[number]

    raw = label

    def number(self, raw: Any) -> int:
        return self._strings.intern(raw)


class _DirectField(_Numbered):
    def __init__(self, name: str, context: FieldContext) -> None:
        super().__init__(context)
        self._name = name

    def ids(self, batch: EventBatch) -> Ids:
        ids: Ids = getattr(batch, self._name)
        return ids


class _KindField(_Numbered):
    def __init__(self, context: FieldContext) -> None:
        super().__init__(context)
        self._numbers = np.full(256, -1, np.int32)

    def ids(self, batch: EventBatch) -> Ids:
        for kind in np.flatnonzero(np.bincount(batch.ph, minlength=256)):
            self._numbers[kind] = self._strings.intern(chr(kind))

        return self._numbers[batch.ph]


class _SourceField:
    def __init__(self, context: FieldContext) -> None:
        self._paths = context.paths

    def ids(self, batch: EventBatch) -> Ids:
        return np.full(len(batch.ph), batch.source, np.int32)

    def label(self, number: int) -> Label:
        return str(self._paths[number])

    def raw(self, number: int) -> Any:
        return number

    def number(self, raw: Any) -> int:
        return int(raw)


class ArgField:
    """A key of `args`. Texts and integers have their numbers in StringTable, other values numbers below -1."""

    def __init__(self, key: str, context: FieldContext) -> None:
        self.key, self._strings = key, context.strings
        self._floats: dict[float, int] = {}
        self._values: list[float] = []
        self.seen = False

    def ids(self, batch: EventBatch) -> Ids:
        """Return the number of each row's value."""
        column = batch.args.get(self.key)
        return np.full(len(batch.ph), -1, np.int32) if column is None else self.column_ids(column)

    def column_ids(self, column: ArgColumn) -> Ids:
        """Return the number of each value of a column."""
        ids = column.texts.astype(np.int32)
        integers, floats = column.kinds == INTEGER, column.kinds == FLOAT
        self.seen = self.seen or bool(column.kinds.any())
        if integers.any():
            distinct, where = np.unique(column.integers[integers], return_inverse=True)
            ids[integers] = np.array(self._strings.intern_all(distinct.tolist()), np.int32)[where]

        if floats.any():
            numbers, where = np.unique(column.floats[floats], return_inverse=True)
            ids[floats] = np.array([self._float(number) for number in numbers.tolist()], np.int32)[where]

        return ids

    def label(self, number: int) -> Label:
        """Return the value; as text if JSON has no such number."""
        if number >= -1:
            return self._strings[number]

        value = self._values[-2 - number]
        return value if math.isfinite(value) else str(value)

    def raw(self, number: int) -> Any:
        """Return the value."""
        return self.label(number)

    def number(self, raw: Any) -> int:
        """Return the number of a value."""
        return self._float(raw) if isinstance(raw, float) else self._strings.intern(raw)

    def _float(self, value: float) -> int:
        number = self._floats.get(value)
        if number is None:
            number = self._floats[value] = len(self._values)
            self._values.append(value)

        return -2 - number


class _DerivedField:
    """Rank, host or file: from an argument of the event, else from its process; known after all files were read."""

    def __init__(self, name: str, context: FieldContext) -> None:
        self._name, self._origin = name, context
        self._args = [ArgField(key, context) for key in _DERIVED[name]]
        self._numbers = PairNumbering()  # (argument's value, process)

    def ids(self, batch: EventBatch) -> Ids:
        value = np.full(len(batch.ph), -1, np.int32)
        for arg in self._args:
            value = np.where(value == -1, arg.ids(batch), value)

        process = self._origin.processes.number(batch.source, batch.pid)
        return self._numbers.number(value, process if self._name != "file" else np.zeros_like(process))

    def raw(self, number: int) -> Any:
        value, process = self._numbers.pair(number)
        origin = self._origin.process(process) if self._name != "file" else None
        return self._args[0].raw(value), origin

    def number(self, raw: Any) -> int:
        value, origin = raw
        process = 0 if origin is None else self._origin.processes.one(origin[0], self._origin.strings.intern(origin[1]))
        return self._numbers.one(self._args[0].number(value), process)

    def label(self, number: int) -> Label:
        value, process = self._numbers.pair(number)
        labels = self._origin.labels
        if value != -1:
            raw = self._args[0].label(value) if value >= -1 else None
            known = {"host": labels.hosts, "file": labels.files}.get(self._name, {})
            return known.get(str(raw), raw)

        if self._name == "file":
            return None

        source, pid = self._origin.process(process)
        return labels.rank(source, pid) if self._name == "rank" else labels.host(source, pid)


EventField = _DirectField | _KindField | _SourceField | ArgField | _DerivedField
"""One field: a number for each event (-1 where there is none), and a label for each number, once all metadata is known.

`raw` returns the value behind a number, which is the same in every process; `number` is its inverse.
"""
