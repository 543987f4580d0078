"""Export of a run as tables, one Parquet or CSV file each, written while the store is read."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from traceml.database.schema import INFO, LOGGED, PACKED
from traceml.database.store.reader import Frame, StreamRecord
from traceml.errors import UsageError
from traceml.runs.export.frame_pass import FramePass
from traceml.runs.export.table_columns import (
    TABLES,
    ExportTable,
    Part,
    RepeatedTexts,
    log_part,
    packed_part,
    parquet_library,
    parquet_schema,
    to_json,
)

__all__ = ["export_tables"]

_STORED = (*(table.name for table in PACKED), LOGGED.name, INFO.name)
_GROUP = 65_536  # rows of a Parquet row group


def export_tables(frames: FramePass, form: str, folder: Path) -> dict[str, int]:
    """Write all tables into a folder; return the number of rows by table.

    Args:
        form: parquet or csv.
        folder: created if missing; files of an earlier export are replaced, others are kept.

    Raises:
        UsageError: Parquet without pyarrow, or the folder is a file.
    """
    make = _Csv if form == "csv" else partial(_Parquet, parquet_library("Parquet", ", or take --format csv"))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; {form} goes into a folder, a file per table")

    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f".{os.getpid()}-{name}.{form}" for name in TABLES}
    try:
        with ExitStack() as stack:
            files = {name: make(drafts[name], table) for name, table in TABLES.items()}
            for file in files.values():
                stack.callback(file.close)

            counts = _write_all(frames, files)

        for name, draft in drafts.items():
            draft.replace(folder / f"{name}.{form}")
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)

    return counts


def _write_all(frames: FramePass, files: dict[str, _Csv | _Parquet]) -> dict[str, int]:
    """Write all tables; return their numbers of rows."""
    counts = dict.fromkeys(files, 0)

    def add(table: str, part: Part, rows: int) -> None:
        files[table].add(part, rows)
        counts[table] += rows

    def take(stream: StreamRecord, frame: Frame) -> None:
        dtype = frames.reader.dtype(frame.table)
        if dtype is None:
            maps = frame.maps()
            add(frame.table, log_part(stream, frames.clocks, maps, frame.table), len(maps))
        else:
            rows, name_of = np.frombuffer(frame.data, dtype), partial(frames.name_of, stream.id)
            add(frame.table, packed_part(stream, frames.clocks, rows, name_of, frame.table), frame.n)

    ranks = list(frames.streams.values())
    add("ranks", _ranks(ranks), len(ranks))
    with frames.noting():
        facts = [(key, to_json(value)) for key, value in frames.reader.meta().items()]
        add("run", {"key": [key for key, _ in facts], "value_json": [text for _, text in facts]}, len(facts))

    with frames.noting():
        events = frames.reader.events()
        part: Part = {
            "time_epoch_ns": [event.epoch_ns for event in events],
            "kind": [event.kind for event in events],
            "data_json": [to_json(event.data) for event in events],
        }
        add("events", part, len(events))

    frames.read(_STORED, take)
    return counts


def _ranks(streams: list[StreamRecord]) -> Part:
    return {
        "attempt": [stream.attempt for stream in streams],
        "rank": [stream.rank for stream in streams],
        "host": [stream.host for stream in streams],
        "pid": [stream.identity.pid for stream in streams],
        "state": [stream.state for stream in streams],
        "data_json": [to_json(stream.facts) for stream in streams],
    }


class _Csv:
    """CSV file with a header line; null is an empty field."""

    def __init__(self, path: Path, table: ExportTable) -> None:
        self._file = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
        self._columns = [column.name for column in table.columns]
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self._columns)

    def add(self, part: Part, rows: int) -> None:
        """Write rows."""
        self._writer.writerows(zip(*(_listed(part[name], rows) for name in self._columns), strict=True))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class _Parquet:
    """Parquet file; rows are collected into row groups."""

    def __init__(self, pa: Any, path: Path, table: ExportTable) -> None:
        self._pa, self._schema = pa, parquet_schema(pa, table.columns, description=table.doc)
        self._writer = pa.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._rows = 0

    def add(self, part: Part, rows: int) -> None:
        """Write rows once there are enough for a row group."""
        arrays = [self._array(part[field.name], rows, field.type) for field in self._schema]
        self._waiting.append(self._pa.record_batch(arrays, schema=self._schema))
        self._rows += rows
        if self._rows >= _GROUP:
            self._write()

    def close(self) -> None:
        """Finish the file."""
        with suppress(OSError):  # the caller reports its own error
            self._write()

        self._writer.close()

    def _write(self) -> None:
        if self._waiting:
            self._writer.write_table(self._pa.Table.from_batches(self._waiting, schema=self._schema))

        self._waiting, self._rows = [], 0

    def _array(self, values: Any, rows: int, kind: Any) -> Any:
        if values is None or isinstance(values, (int, float, str)):
            return self._pa.array([values], kind).take(self._pa.array(np.zeros(rows, np.int64)))

        if isinstance(values, RepeatedTexts):
            return self._array(values.texts, len(values.texts), kind).take(self._pa.array(values.at))

        if isinstance(values, np.ma.MaskedArray):
            return self._pa.array(np.asarray(values.data), kind, mask=np.ma.getmaskarray(values))

        if isinstance(values, list) and kind == self._pa.string():
            values = [None if each is None else each.encode("utf-8", "backslashreplace").decode() for each in values]

        return self._pa.array(values, kind)


def _listed(values: Any, rows: int) -> Iterator[Any] | list[Any]:
    if values is None or isinstance(values, (int, float, str)):
        return [values] * rows

    if isinstance(values, RepeatedTexts):
        values = np.array(values.texts, object)[values.at]

    listed: list[Any] = values if isinstance(values, list) else values.tolist()
    return listed
