"""Columns of a trace as arrays. What is missing, no number or no duration is refused with its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from traceml.errors import UsageError

__all__ = ["COLUMNS", "trace_columns"]

_NEEDED = ("dp_rank", "stage", "rank", "step", "seq_id")
_OPTIONAL = ("mc", "gmc", "mb_id")  # -1, or no value, where an operation has none
_LARGEST = 2**53  # integer that a float holds with all before it
_SECONDS = ("start_ts", "duration")
COLUMNS = (*_NEEDED, *_OPTIONAL, "optype", *_SECONDS)


def trace_columns(path: Path, table: Any) -> dict[str, Any]:
    """Return the columns of a table of pyarrow as arrays; `optype` as (labels, codes).

    Raises:
        UsageError: a value is not what its column holds.
    """
    rows: dict[str, Any] = {name: _integers(path, table, name) for name in (*_NEEDED, *_OPTIONAL)}
    for name in _SECONDS:
        values = _numbers(path, table, name).astype(np.float64)
        is_wrong = ~np.isfinite(values) if name == "start_ts" else ~(np.isfinite(values) & (values >= 0))
        expected = "a time in seconds" if name == "start_ts" else "seconds, 0 or more"
        _refuse_first(path, table, name, is_wrong, expected)
        rows[name] = values

    rows["optype"] = _kinds(path, table)
    return rows


def _numbers(path: Path, table: Any, name: str) -> NDArray[Any]:
    """Return a column, NaN where it has no value; of a column without a missing one its own type."""
    import pyarrow.types as types

    column = table[name]
    if not (types.is_integer(column.type) or types.is_floating(column.type)):
        _refuse(path, table, name, 0, f"a number, not {column.type}")

    return np.asarray(column.to_numpy())


def _integers(path: Path, table: Any, name: str) -> NDArray[np.int64]:
    values = _numbers(path, table, name)
    if values.dtype.kind != "f":
        return values.astype(np.int64)

    if name in _OPTIONAL:
        values = np.where(np.isnan(values), -1, values)

    _refuse_first(path, table, name, ~((np.abs(values) <= _LARGEST) & (values == np.round(values))), "an integer")
    return values.astype(np.int64)


def _kinds(path: Path, table: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    import pyarrow

    texts = table["optype"].cast(pyarrow.string()).fill_null("").to_numpy().astype(str)
    labels, codes = np.unique(texts, return_inverse=True)
    _refuse_first(path, table, "optype", (labels == "")[codes], "a kind of operation")
    return labels, codes


def _refuse_first(path: Path, table: Any, name: str, is_wrong: NDArray[np.bool_], expected: str) -> None:
    if is_wrong.any():
        _refuse(path, table, name, int(np.argmax(is_wrong)), expected)


def _refuse(path: Path, table: Any, name: str, row: int, expected: str) -> NoReturn:
    value = table[name][row].as_py()
    raise UsageError(
        f"{path}: {name} of row {row} is {'missing' if value is None else repr(value)}, expected {expected}"
    )
