"""Layout and counters of the tables in a flight file, and the parts that can be read when others are damaged.

Process: those of `postmortem`.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from traceml.database.flight.flight_header import COUNTERS_AT, DATA_AT
from traceml.database.flight.row_rings import COUNTERS_PER_TABLE
from traceml.database.schema import TABLES, Table
from traceml.errors import StoreError

__all__ = [
    "UNREADABLE",
    "TableCounters",
    "TableExtent",
    "damaged",
    "read_counters",
    "read_layout",
    "unpacked_header",
    "whole_maps",
]

UNREADABLE = (ValueError, TypeError, msgpack.UnpackException)
"""Errors of damaged msgpack; TypeError: a key that cannot be one."""

_log = logging.getLogger("traceml")


class TableExtent(NamedTuple):
    """Location of a table in the file."""

    name: str
    offset: int
    capacity: int
    row_bytes: int


class TableCounters(NamedTuple):
    """Counters of one table when the process died, in rows.

    `base` is the number of a log's first map in memory; earlier maps are stored or in the journal.
    """

    appended: int
    sent: int
    acked: int
    dropped: int
    base: int

    @property
    def is_possible(self) -> bool:
        """Whether a writer can have left them: no row is sent, stored or removed before it is appended."""
        return all(0 <= count <= self.appended for count in (self.sent, self.acked, self.base)) and self.dropped >= 0


def read_layout(path: Path, entries: Any, file_bytes: int) -> dict[str, tuple[int, TableExtent]]:
    """Return number and location of each table by name.

    Args:
        entries: the layout in its header: name, offset, capacity, bytes per row and columns of each table.
        file_bytes: size of the file when it was created.

    Raises:
        StoreError: a table has other columns than here, or is not where its writer puts one.
    """
    tables = {}
    try:
        for number, (name, offset, capacity, row_bytes, columns) in enumerate(entries):
            _check_columns(path, name, columns)
            extent = TableExtent(name, offset, capacity, row_bytes)
            _check_extent(path, extent, file_bytes)
            tables[name] = number, extent
    except (ValueError, TypeError) as error:
        raise damaged(path, "the layout of its tables has another form") from error

    return tables


def read_counters(path: Path, name: str, data: bytes, number: int) -> TableCounters:
    """Return the counters of a table; all 0, with a warning, where damage has made them impossible.

    The hot path counts by one store per row, which leaves no room for a checksum.
    """
    found = TableCounters(*struct.unpack_from("@5q", data, COUNTERS_AT + number * COUNTERS_PER_TABLE * 8))
    if found.is_possible:
        return found

    text = "flight file %s: the counters of its table %r are damaged (%d rows, %d sent, %d stored): none of it is used"
    _log.warning(text, path, name, found.appended, found.sent, found.acked)
    return TableCounters(0, 0, 0, 0, 0)


def unpacked_header(path: Path, data: bytes) -> Any:
    """Return a packed part of the header.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except UNREADABLE as error:
        raise damaged(path, "its header cannot be unpacked") from error


def whole_maps(data: bytes, count: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the first maps of a log, at most `count`, up to a damaged one, and the offset after each, from 0."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1), strict_map_key=False)
    unpacker.feed(data)
    maps: list[dict[str, Any]] = []
    ends = [0]
    with contextlib.suppress(*UNREADABLE):
        while len(maps) < count and isinstance(row := unpacker.unpack(), dict):
            maps.append(row)
            ends.append(unpacker.tell())

    return maps, ends


def damaged(path: Path, why: str) -> StoreError:
    """Return the error of a damaged flight file."""
    return StoreError(f"flight file {path} is damaged: {why}. Delete it.")


def _check_columns(path: Path, name: str, columns: Any) -> None:
    table = TABLES.get(name)
    if table is None or table.layout != columns:
        raise StoreError(
            f"flight file {path}: table {name!r} has columns that this version of traceml does not know. "
            "Read it with the version that wrote it, or delete it."
        )


def _check_extent(path: Path, extent: TableExtent, file_bytes: int) -> None:
    table = TABLES[extent.name]
    row_bytes = table.row_bytes if isinstance(table, Table) else 1
    last = file_bytes - extent.capacity * row_bytes
    is_ring = not isinstance(table, Table) or extent.capacity & (extent.capacity - 1) == 0  # else its mask is none
    if extent.row_bytes != row_bytes or extent.capacity < 1 or not is_ring or not DATA_AT <= extent.offset <= last:
        raise damaged(path, f"its table {extent.name!r} is out of bounds")
