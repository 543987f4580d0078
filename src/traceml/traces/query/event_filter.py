"""Conditions of a query, applied to the columns of a batch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.errors import UsageError
from traceml.traces.query.expressions import MEASURES, AllOf, Condition, Expression, Negation, comparisons
from traceml.traces.query.fields import ArgField, EventField, FieldContext, Ids, field_of
from traceml.traces.reader.columns import FLOAT, INTEGER, NO_TIME, TEXT, ArgColumn, EventBatch

__all__ = ["EventFilter", "compare"]

_MAX_CASES = 5  # bits of a begin's mark

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
    """All conditions of a query.

    A begin event has no duration yet. `outcomes` says for each duration that conditions distinguish whether the event
    would pass with it; `passes` applies this to the span's duration.

    Raises:
        UsageError: conditions distinguish too many durations.
    """

    def __init__(self, where: Sequence[Expression], context: FieldContext) -> None:
        self._where = AllOf(tuple(where)) if where else None
        conditions = dict.fromkeys(each for part in where for each in comparisons(part))
        others = [each for each in conditions if each.field not in MEASURES]
        self._fields = {each: _FieldCondition(each, field_of(each.field, context)) for each in others}
        self._on_begin = [each for each in conditions if each.field == "ts"]
        self._on_duration = [each for each in conditions if each.field == "dur"]
        self._cases = _duration_cases(self._on_duration)

    def __bool__(self) -> bool:
        return self._where is not None

    @property
    def fields(self) -> list[EventField]:
        """The fields in conditions."""
        return [each.field for each in self._fields.values()]

    @property
    def absent(self) -> list[str]:
        """The keys of `args` in conditions that no event had."""
        return [field.key for field in self.fields if isinstance(field, ArgField) and not field.seen]

    def rows(self, batch: EventBatch, durations: NDArray[np.int64] | None = None) -> Mask:
        """Return which rows pass.

        Args:
            durations: in nanoseconds, below 0 for none; those of the batch by default.
        """
        durations = batch.dur_ns if durations is None else durations
        exact = {row: dur for row, (_, dur) in batch.exact.items()}
        of_fields = self._masks(batch)
        return self._evaluated(of_fields | {each: _times_pass(each, durations, exact) for each in self._on_duration})

    def outcomes(self, batch: EventBatch) -> NDArray[np.uint8]:
        """Return for each row a bit per case of `passes`: whether it passes with such a duration."""
        of_fields, found = self._masks(batch), np.zeros(len(batch.ph), np.uint8)
        for number, case in enumerate(self._cases):
            always = {each: np.full(len(found), holds) for each, holds in zip(self._on_duration, case, strict=True)}
            found |= self._evaluated(of_fields | always).astype(np.uint8) << np.uint8(number)

        return found

    def passes(self, outcomes: NDArray[np.uint8], durations: NDArray[np.int64]) -> Mask:
        """Return which spans pass: `outcomes` of their begins, and their durations in nanoseconds."""
        held = [_times_pass(each, durations, {}) for each in self._on_duration]
        mask = np.zeros(len(durations), np.bool_)
        for number, case in enumerate(self._cases):
            like = [passed == holds for passed, holds in zip(held, case, strict=True)]
            mask |= functools.reduce(np.logical_and, like, (outcomes >> np.uint8(number) & np.uint8(1)) != 0)

        return mask

    def _masks(self, batch: EventBatch) -> dict[Condition, Mask]:
        """Return which rows pass each condition, apart from those on durations."""
        exact = {row: ts for row, (ts, _) in batch.exact.items()}
        times = {each: _times_pass(each, batch.ts_ns, exact, NO_TIME + 1) for each in self._on_begin}
        return times | {each: field.rows(batch) for each, field in self._fields.items()}

    def _evaluated(self, masks: Mapping[Condition, Mask]) -> Mask:
        assert self._where is not None
        return _evaluated(self._where, masks)


def _evaluated(expression: Expression, masks: Mapping[Condition, Mask]) -> Mask:
    if isinstance(expression, Condition):
        return masks[expression]

    if isinstance(expression, Negation):
        return ~_evaluated(expression.part, masks)

    join = np.logical_and if isinstance(expression, AllOf) else np.logical_or
    return functools.reduce(join, (_evaluated(part, masks) for part in expression.parts))


def _duration_cases(conditions: Sequence[Condition]) -> list[tuple[bool, ...]]:
    """Return the ways in which conditions on durations can come out: one per kind of duration that they distinguish."""
    limits = sorted({condition.number for condition in conditions if condition.number is not None})
    middles = [(low + high) / 2 for low, high in pairwise(limits)]
    tried = [*limits, *middles, *((limits[0] - 1, limits[-1] + 1) if limits else (Fraction(0),))]
    cases = list(dict.fromkeys(tuple(each.accepts(value) for each in conditions) for value in tried))
    if len(cases) > _MAX_CASES:
        raise UsageError(
            f"where: at most {_MAX_CASES} ranges of dur are possible, not {len(cases)}: compare it less often"
        )

    return cases


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
    condition: Condition, times_ns: NDArray[np.int64], exact: Mapping[int, int | None], least_ns: int = 0
) -> Mask:
    """Return which times pass a condition.

    Args:
        condition: compares a time.
        times_ns: times; below `least_ns` for none.
        exact: the times of rows for which `times_ns` has no room.
    """
    assert condition.number is not None
    passed = compare(times_ns, condition.operator, condition.number * 1000)
    mask = np.where(times_ns >= least_ns, passed, condition.operator == "!=")
    for row, time_ns in exact.items():
        mask[row] = condition.accepts(None if time_ns is None else Fraction(time_ns, 1000))

    return mask
