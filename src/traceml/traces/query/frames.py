"""Columns of values instead of numbers, for numpy, polars and pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.errors import UsageError
from traceml.traces.query.fields import FieldContext, field_of
from traceml.traces.reader.columns import NO_TIME, EventBatch

__all__ = ["EVENT_FIELDS", "decoded", "frame_of"]

EVENT_FIELDS = ("name", "cat", "ph", "pid", "tid")
_INT64 = 2**63

Columns = dict[str, list[Any]]


def decoded(batch: EventBatch, fields: Sequence[str], context: FieldContext, mask: NDArray[np.bool_] | None) -> Columns:
    """Return the events of a batch as columns of values, None if an event has none.

    Args:
        fields: fields to return besides `ts_ns` and `dur_ns`.
        context: meaning of the numbers.
        mask: rows to return; None for all.
    """
    columns: Columns = {}
    for name in fields:
        field = field_of(name, context)
        ids = field.ids(batch)
        numbers, where = np.unique(ids if mask is None else ids[mask], return_inverse=True)
        labels = np.array([*(field.label(number) for number in numbers.tolist()), None], object)
        columns[name] = labels[where].tolist()

    for name, times, missing in (("ts_ns", batch.ts_ns, NO_TIME), ("dur_ns", batch.dur_ns, -1)):
        values = times if mask is None else times[mask]
        columns[name] = np.where(values == missing, None, values).tolist()  # type: ignore[call-overload]

    return columns


def frame_of(columns: Mapping[str, Sequence[Any]], library: str) -> Any:
    """Return a frame of polars or pandas.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        made = import_module(library).DataFrame
    except ImportError as error:
        raise UsageError(f"to_{library}() needs {library}: pip install {library}") from error

    return made({name: _uniform(values) for name, values in columns.items()})


def _uniform(values: Sequence[Any]) -> list[Any]:
    """Return values of one type: numbers, or texts if there is any text; integers beyond 64 bits become floats."""
    kinds = {type(value) for value in values}
    if str in kinds and kinds - {str, type(None)}:
        return [None if value is None else str(value) for value in values]

    wide = any(isinstance(value, int) and not -_INT64 <= value < _INT64 for value in values)
    if wide or {int, float} <= kinds:
        return [None if value is None else float(value) for value in values]

    return list(values)
