"""Conditions of a query, applied to the columns of a batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.query.expressions import Condition
from traceml.traces.query.fields import ArgField, EventField, FieldContext, Ids, field_of
from traceml.traces.reader.columns import FLOAT, INTEGER, NO_TIME, TEXT, ArgColumn, EventBatch, ExactTimes

__all__ = ["EventFilter", "compare"]

Mask = NDArray[np.bool_]
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_GREATEST = 2**63 - 1


class EventFilter:
    """All conditions of a query. Those on durations are separate, since a begin event has none yet."""

    def __init__(self, conditions: Sequence[Condition], context: FieldContext) -> None:
        self._dur = [condition for condition in conditions if condition.field == "dur"]
        self._ts = [condition for condition in conditions if condition.field == "ts"]
        rest = [condition for condition in conditions if condition.field not in ("dur", "ts")]
        self._fields = [_FieldCondition(condition, field_of(condition.field, context)) for condition in rest]

    def __bool__(self) -> bool:
        return bool(self._dur or self._ts or self._fields)

    @property
    def fields(self) -> list[EventField]:
        """The fields in conditions."""
        return [each.field for each in self._fields]

    @property
    def absent(self) -> list[str]:
        """The keys of `args` in conditions that no event had."""
        return [field.key for field in self.fields if isinstance(field, ArgField) and not field.seen]

    def rows(self, batch: EventBatch) -> Mask:
        """Return which rows pass, apart from conditions on durations."""
        exact = {row: ts for row, (ts, _) in batch.exact.items()}
        mask = _times_pass(self._ts, batch.ts_ns, batch.ts_ns != NO_TIME, exact)
        for each in self._fields:
            mask &= each.rows(batch)

        return mask

    def durations(self, duration: NDArray[np.int64], exact: Mapping[int, ExactTimes] | None = None) -> Mask:
        """Return which durations (ns; below 0 for none) pass.

        Args:
            duration: as in the columns of a batch.
            exact: exact times of some rows.
        """
        return _times_pass(self._dur, duration, duration >= 0, {row: dur for row, (_, dur) in (exact or {}).items()})


class _FieldCondition:
    """A condition on a field with labels; each label is tested once."""

    def __init__(self, condition: Condition, field: EventField) -> None:
        self._condition, self.field = condition, field
        self._accepts = condition.accepts
        if condition.operator == "~":
            matches = condition.matcher()
            self._accepts = lambda value: value is not None and matches(str(value))

        self._tested: dict[int, bool] = {}
        self._table = np.zeros(1024, np.int8)  # by number + 1: 0 not tested yet, 1 refused, 2 accepted

    def rows(self, batch: EventBatch) -> Mask:
        if isinstance(self.field, ArgField) and self._condition.operator != "~":
            column = batch.args.get(self.field.key)
            return np.zeros(len(batch.ph), np.bool_) if column is None else self._arg_rows(column)

        return self._by_label(self.field.ids(batch))

    def _test(self, number: int) -> bool:
        if number not in self._tested:
            self._tested[number] = self._accepts(self.field.label(number))

        return self._tested[number]

    def _by_label(self, ids: Ids) -> Mask:
        if not len(ids) or ids.min() < -1:
            distinct, where = np.unique(ids, return_inverse=True)
            passed = np.array([self._test(number) for number in distinct.tolist()], np.bool_)
            return np.asarray(passed[where] if len(ids) else np.zeros(0), np.bool_)

        top = int(ids.max()) + 2
        if len(self._table) < top:
            self._table = np.concatenate([self._table, np.zeros(2 * top - len(self._table), np.int8)])

        tested = self._table[ids + 1]
        for number in np.unique(ids[tested == 0]).tolist():
            self._table[number + 1] = 1 + self._test(number)

        return np.asarray(self._table[ids + 1] == 2)

    def _arg_rows(self, column: ArgColumn) -> Mask:
        condition = self._condition
        assert isinstance(self.field, ArgField)
        self.field.seen = self.field.seen or bool(column.kinds.any())
        mask = np.full(len(column.kinds), condition.operator == "!=", np.bool_)
        texts = column.kinds == TEXT
        if texts.any():
            mask[texts] = self._by_label(column.texts[texts])

        for kind, values in ((INTEGER, column.integers), (FLOAT, column.floats)):
            rows = column.kinds == kind
            if condition.number is not None and rows.any():
                mask[rows] = compare(values[rows], condition.operator, condition.number)

        return mask


def compare(values: NDArray[Any], operator_: str, number: Fraction) -> Mask:
    """Compare each value with an exact number: integers stay integers."""
    if values.dtype.kind == "f":
        return np.asarray(_COMPARE[operator_](values, float(number)), np.bool_)

    if operator_ in ("=", "!=") and number.denominator != 1:
        return np.full(len(values), operator_ == "!=", np.bool_)

    bound = math.floor(number) if operator_ in ("<=", ">") else math.ceil(number)
    if abs(bound) > _GREATEST:
        return np.full(len(values), _COMPARE[operator_](0, bound), np.bool_)

    return np.asarray(_COMPARE[operator_](values, bound), np.bool_)


def _times_pass(
    conditions: Sequence[Condition], times_ns: NDArray[np.int64], known: Mask, exact: Mapping[int, int | None]
) -> Mask:
    """Return which times pass all conditions; `known` is false where a row has none, `exact` overrides some rows."""
    mask = np.ones(len(times_ns), np.bool_)
    for condition in conditions:
        assert condition.number is not None
        passed = compare(times_ns, condition.operator, condition.number * 1000)
        mask &= np.where(known, passed, condition.operator == "!=")

    for row, time_ns in exact.items():
        time_us = None if time_ns is None else Fraction(time_ns, 1000)
        mask[row] = all(condition.accepts(time_us) for condition in conditions)

    return mask
