"""Tables of a Parquet or CSV export: their columns, and the conversion of rows from the store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import (
    INFO,
    LINE_PHASES,
    LOGGED,
    METRICS,
    PACKED,
    MetricKind,
    Pause,
    Resource,
    StepFlag,
    Table,
    line_phase_name,
    other_ns,
    unpack_bits,
)
from traceml.database.store.reader import StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.errors import UsageError
from traceml.installation import install_command

__all__ = [
    "TABLES", "ExportColumn", "ExportTable", "Part", "RepeatedTexts", "log_part", "packed_part", "parquet_library",
    "parquet_schema", "to_json",
]  # fmt: skip

Kind = Literal["int64", "float64", "string", "bool"]
Part = dict[str, Any]
"""Column -> values of some rows: an array, a list, `RepeatedTexts`, or one value for all rows. None is written as null,
and so is a negative number, which means "not known" in all columns but `_SIGNED` and those of metrics."""


class RepeatedTexts(NamedTuple):
    """Texts of a column that has few different ones."""

    texts: list[str | None]  # the different texts
    at: NDArray[np.intp]  # index of each row's text


@dataclass(frozen=True, slots=True)
class ExportColumn:
    """Column: its name with the unit as suffix, type, and meaning."""

    name: str
    kind: Kind
    doc: str


@dataclass(frozen=True, slots=True)
class ExportTable:
    """Table, which is a separate file."""

    name: str
    doc: str
    columns: tuple[ExportColumn, ...]


_STREAM_COLUMNS = (
    ExportColumn("attempt", "int64", "number of restarts of the job"),
    ExportColumn("rank", "int64", "the rank"),
    ExportColumn("host", "string", "its host"),
)
_DOCS = {
    "steps": "one row per rank and training step; phases and `other_ns` add up to `total_ns`",
    "user_phases": "the user's phases, one row per rank, step and name",
    "evals": "evaluation between steps",
    "epochs": "waiting for the first batch of each new iterator of a data loader",
    "device_steps": "device times of a step, with a GPU",
    "process": "samples of each rank's process",
    "host": "samples of each host",
    "gpu": "samples of each GPU",
    "torch_memory": "samples of torch's allocator on a device",
    "loader_workers": "worker processes of a data loader's iterator, all together",
    "limits": "use of resources that have a limit, when it has changed",
    "telemetry": "activity and cost of tracing itself",
    "metrics": "all logged values",
    "losses": "losses of training steps, at most 20 a second",
    "fingerprints": "hashes of some batches, by which ranks that train on the same data are found",
    "pauses": "pauses of the training: garbage collections, compilations, checkpoints",
    "lines": "samples of the lines that the training thread and loader workers ran, by phase; one row per line and 5 s",
}
_TIME = ExportColumn("time_epoch_ns", "int64", "time in nanoseconds since 1970 by the aggregator's clock")
_JSON = ExportColumn("data_json", "string", "everything else, as a JSON object")
_FLAG_WORDS = {
    StepFlag.EXPLICIT: "its bounds are those of trace_step()",
    StepFlag.INFERRED: "no optimizer was seen",
    StepFlag.SKIPPED: "by GradScaler, as gradients were not finite",
    StepFlag.NO_LOADER: "none took part",
    StepFlag.DEVICE: "it has a row in device_steps",
    StepFlag.CALLBACK: "backward_own_ns was measured",
    StepFlag.EPOCH: "it waited for the first batch of an iterator",
    StepFlag.PROFILED: "torch.profiler ran, or was started or stopped",
    StepFlag.CLOSURES: "the optimizer called its closure several times",
}


def _flag_text(flag: StepFlag) -> str:
    return f"{int(flag)} {str(flag.name).lower().replace('_', ' ')} ({_FLAG_WORDS[flag]})"


def _one_of(kinds: type[IntEnum]) -> str:
    return ", ".join(each.name.lower() for each in kinds)


# Columns of the store that have another name or form in the export.
_RENAMED = {"ns": "duration_ns", "kind": "source"}
_REPLACED: dict[str, tuple[ExportColumn, ...]] = {
    "t_ns": (_TIME,),
    "t_end_ns": (ExportColumn("end_epoch_ns", "int64", "its end in nanoseconds since 1970 by the aggregator's clock"),),
    "name_id": (ExportColumn("name", "string", "its name"),),
    "resource": (ExportColumn("resource", "string", f"the resource: {_one_of(Resource)}"),),
    "phase": (ExportColumn("phase", "string", "the phase that was open: " + ", ".join(LINE_PHASES.values())),),
    "line_id": (ExportColumn("line", "string", "the user's line, `FILE:LINE FUNCTION`; null without one"),),
    "library_id": (
        ExportColumn("library", "string", "innermost library function that it had called, null without one"),
    ),
    "cause": (ExportColumn("cause", "string", f"the cause: {_one_of(Pause)}"),),
    "text_id": (ExportColumn("text", "string", "the guard that failed, or a checkpoint's file; null without one"),),
    "kind": (ExportColumn("source", "string", f"its source: {_one_of(MetricKind)}"),),
    "bits": (
        ExportColumn("other_ns", "int64", "rest of total_ns: code outside the known phases"),
        ExportColumn("micro_batches", "int64", "micro-batches of gradient accumulation"),
        ExportColumn("flags", "int64", "bits: " + "; ".join(map(_flag_text, StepFlag))),
        ExportColumn("sequence", "int64", "collectives issued so far"),
    ),
}
_NAMES = {"name_id": "name", "line_id": "line", "library_id": "library", "text_id": "text"}
_ENUMS: dict[str, type[IntEnum]] = {"resource": Resource, "cause": Pause, "kind": MetricKind}
_SIGNED = ("loss", "fingerprint")


def parquet_library(what: str, otherwise: str = "") -> Any:
    """Return `pyarrow` with its module `parquet`.

    Args:
        what: needs it, otherwise: another way, for the error.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        why = f"{what} needs pyarrow, which cannot be imported ({error}): {install_command('parquet')}"
        raise UsageError(f"{why}{otherwise}") from error

    return pyarrow


def parquet_schema(pa: Any, columns: Sequence[ExportColumn], **about: str) -> Any:
    """Return the schema of a Parquet file, with the meaning of each column."""
    kinds = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_()}
    fields = [pa.field(each.name, kinds[each.kind], metadata={"description": each.doc}) for each in columns]
    return pa.schema(fields, metadata=about or None)


def _table(table: Table) -> ExportTable:
    columns = list(_STREAM_COLUMNS)
    for column in table.columns:
        kind: Kind = "int64" if column.code == "q" else "float64"
        doc = re.sub(r"-1(?= (when|where|without) )", "null", column.doc)
        columns += _REPLACED.get(column.name, (ExportColumn(_RENAMED.get(column.name, column.name), kind, doc),))

    return ExportTable(table.name, _DOCS[table.name], tuple(columns))


_LOG_COLUMNS = (*_STREAM_COLUMNS, _TIME, ExportColumn("kind", "string", "kind of row"),
                ExportColumn("name", "string", "its name, null where it has none"), _JSON)  # fmt: skip
TABLES: dict[str, ExportTable] = {
    **{table.name: _table(table) for table in PACKED},
    "logged": ExportTable("logged", "logged data other than numbers: params, texts, artifacts, …", _LOG_COLUMNS),
    "info": ExportTable("info", "facts that ranks reported; `data_json` has the fields of a kind", _LOG_COLUMNS),
    "ranks": ExportTable(
        "ranks",
        "one row per rank process, and per child process that logged for a rank",
        (
            *_STREAM_COLUMNS,
            ExportColumn("pid", "int64", "its process id"),
            ExportColumn("state", "string", "its state, or how it ended"),
            _JSON,
        ),
    ),
    "events": ExportTable(
        "events", "events of the run", (_TIME, ExportColumn("kind", "string", "kind of event"), _JSON)
    ),
    "run": ExportTable(
        "run",
        "facts of the run, one row each",
        (ExportColumn("key", "string", "name of the fact"), ExportColumn("value_json", "string", "its value, as JSON")),
    ),
}
"""All exported tables by name."""


def packed_part(
    stream: StreamRecord, clocks: RunClocks, rows: NDArray[np.void], name_of: Callable[[int], str], table: str
) -> Part:
    """Return rows of a packed table as columns; columns that an older store lacks are null."""
    part: Part = _stream_columns(stream)
    names = rows.dtype.names or ()
    for name in names:
        part |= _columns_of(name, rows, stream, clocks, name_of, table)

    return {column.name: part.get(column.name) for column in TABLES[table].columns}


def _columns_of(
    name: str,
    rows: NDArray[np.void],
    stream: StreamRecord,
    clocks: RunClocks,
    name_of: Callable[[int], str],
    table: str,
) -> Part:
    values = rows[name]
    if name == "t_end_ns":
        return {"end_epoch_ns": clocks.from_monotonic(stream.id, values)}

    if name == "t_ns":
        date = clocks.from_wall_clock if table == METRICS.name else clocks.from_monotonic
        return {"time_epoch_ns": date(stream.id, values)}

    if name in _NAMES:
        return {_NAMES[name]: _repeated(values, lambda number: name_of(number) if number >= 0 else None)}

    if name in _ENUMS:
        return {_RENAMED.get(name, name): _repeated(values, partial(_name_in, _ENUMS[name]))}

    if name == "phase":
        return {"phase": _repeated(values, line_phase_name)}

    if name == "bits":
        return _bits(rows)

    # A user's own step may be negative, as a value may.
    is_whole = table == METRICS.name or name in _SIGNED or values.min(initial=0) >= 0
    return {_RENAMED.get(name, name): values if is_whole else np.ma.masked_less(values, 0)}


def _repeated(numbers: NDArray[np.int64], text_of: Callable[[int], str | None]) -> RepeatedTexts:
    found, at = np.unique(numbers, return_inverse=True)
    return RepeatedTexts([text_of(number) for number in found.tolist()], at)


def _bits(rows: NDArray[np.void]) -> Part:
    bits = unpack_bits(rows["bits"])
    return {
        "other_ns": other_ns(rows),
        "micro_batches": bits.micro_batches,
        "flags": bits.flags,
        "sequence": bits.sequence,
    }


def log_part(stream: StreamRecord, clocks: RunClocks, rows: Sequence[Mapping[str, Any]], table: str) -> Part:
    """Return rows of a log as columns."""
    date = {LOGGED.name: clocks.from_wall_clock, INFO.name: clocks.from_monotonic}[table]
    return {
        **_stream_columns(stream),
        "time_epoch_ns": [date(stream.id, int(row.get("t_ns", 0))) for row in rows],
        "kind": [str(row.get("kind", "")) for row in rows],
        "name": [None if row.get("name") is None else str(row["name"]) for row in rows],
        "data_json": [to_json({k: v for k, v in row.items() if k not in ("t_ns", "kind", "name")}) for row in rows],
    }


def to_json(value: Any) -> str:
    """Return any value of a store as JSON: bytes in base64, numbers that are not finite as null."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def _stream_columns(stream: StreamRecord) -> Part:
    return {"attempt": stream.attempt, "rank": stream.rank, "host": stream.host}


def _name_in(kinds: type[IntEnum], number: int) -> str:
    try:
        return kinds(number).name.lower()
    except ValueError:
        return str(number)
