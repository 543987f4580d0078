"""Export of a run as tables, one Parquet or CSV file each, written while the store is read."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from traceml.database.schema import INFO, LOGGED, NAMES, PACKED
from traceml.database.store.reader import Frame, StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.errors import StoreError, UsageError
from traceml.installation import install_command
from traceml.runs.export.export_progress import Progress, no_progress
from traceml.runs.export.table_columns import TABLES, ExportTable, Part, RepeatedTexts, log_part, packed_part, to_json

__all__ = ["export_tables"]

_STORED = (NAMES.name, *(table.name for table in PACKED), LOGGED.name, INFO.name)
_GROUP = 65_536  # rows of a Parquet row group


def export_tables(
    reader: StoreReader, form: str, folder: Path, progress: Progress = no_progress
) -> tuple[dict[str, int], list[str]]:
    """Write all tables into a folder; return the number of rows by table, and messages about unreadable parts.

    Args:
        form: parquet or csv.
        folder: created if missing; files of an earlier export are replaced, others are kept.

    Raises:
        UsageError: Parquet without pyarrow, or the folder is a file.
        StoreError: the streams cannot be read.
    """
    make = _maker(form)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; {form} goes into a folder, a file per table")

    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f".{os.getpid()}-{name}.{form}" for name in TABLES}
    damage: list[str] = []
    try:
        with ExitStack() as stack:
            files = {name: make(drafts[name], table) for name, table in TABLES.items()}
            for file in files.values():
                stack.callback(file.close)

            counts = _TablesExport(reader, files, damage).run(progress)

        for name, draft in drafts.items():
            draft.replace(folder / f"{name}.{form}")
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)

    return counts, damage


class _TablesExport:
    def __init__(self, reader: StoreReader, files: dict[str, _Csv | _Parquet], damage: list[str]) -> None:
        self._reader, self._files, self._damage = reader, files, damage
        self._streams = {stream.id: stream for stream in reader.streams()}
        self._clocks = RunClocks(self._streams.values())
        self._names: dict[tuple[int, int], str] = {}
        self._counts = dict.fromkeys(files, 0)
        self._after = 0  # the last frame that was read in order

    def run(self, progress: Progress) -> dict[str, int]:
        """Write all tables; return their numbers of rows."""
        ranks = list(self._streams.values())
        self._add("ranks", _ranks(ranks), len(ranks))
        self._guarded(self._facts)
        self._guarded(self._events)
        if not self._guarded(partial(self._rows, progress)):
            self._salvage()

        return self._counts

    def _guarded(self, write: Callable[[], None]) -> bool:
        """Write a part; return whether it is complete."""
        try:
            write()
        except StoreError as error:
            if str(error) not in self._damage:
                self._damage.append(str(error))

            return False

        return True

    def _facts(self) -> None:
        facts = [(key, to_json(value)) for key, value in self._reader.meta().items()]
        self._add("run", {"key": [key for key, _ in facts], "value_json": [text for _, text in facts]}, len(facts))

    def _events(self) -> None:
        events = self._reader.events()
        part: Part = {
            "time_epoch_ns": [event.epoch_ns for event in events],
            "kind": [event.kind for event in events],
            "data_json": [to_json(event.data) for event in events],
        }
        self._add("events", part, len(events))

    def _rows(self, progress: Progress) -> None:
        last = self._reader.last_id()
        while frames := self._reader.frames_of(_STORED, self._after):
            self._after = frames[-1].id
            progress(self._after, last)
            for frame in frames:
                self._take(frame)

    def _salvage(self) -> None:
        """Write the rows that a damaged page keeps `_rows` from."""
        for frame in self._reader.salvaged_frames(_STORED, self._after):  # names come first
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:  # it is newer than this export
            return

        try:
            if frame.table == NAMES.name:
                self._names |= {(stream.id, row["id"]): row["name"] for row in frame.maps()}
                return

            dtype = self._reader.dtype(frame.table)
            if dtype is None:
                rows = frame.maps()
                self._add(frame.table, log_part(stream, self._clocks, rows, frame.table), len(rows))
            else:
                self._add(frame.table, self._packed(stream, frame, dtype), frame.n)
        except (StoreError, KeyError, ValueError) as error:
            self._damage.append(f"frame {frame.id} of {frame.table}: {error}")

    def _packed(self, stream: StreamRecord, frame: Frame, dtype: Any) -> Part:
        def name_of(number: int) -> str:
            return self._names.get((stream.id, number), f"(name {number})")

        return packed_part(stream, self._clocks, np.frombuffer(frame.data, dtype), name_of, frame.table)

    def _add(self, table: str, part: Part, rows: int) -> None:
        self._files[table].add(part, rows)
        self._counts[table] += rows


def _ranks(streams: list[StreamRecord]) -> Part:
    return {
        "attempt": [stream.attempt for stream in streams],
        "rank": [stream.rank for stream in streams],
        "host": [stream.host for stream in streams],
        "pid": [stream.identity.pid for stream in streams],
        "state": [stream.state for stream in streams],
        "data_json": [to_json(stream.facts) for stream in streams],
    }


def _maker(form: str) -> Callable[[Path, ExportTable], _Csv | _Parquet]:
    if form == "csv":
        return _Csv

    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Parquet needs pyarrow, which cannot be imported ({error}): {install_command('parquet')}, "
            "or take --format csv"
        ) from error

    return _Parquet


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

    def __init__(self, path: Path, table: ExportTable) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        kinds = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
        docs = {"description": table.doc}
        fields = [pa.field(each.name, kinds[each.kind], metadata={"description": each.doc}) for each in table.columns]
        self._schema = pa.schema(fields, metadata=docs)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
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
