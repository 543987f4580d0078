"""Rows of streams that wait to be written to a trace in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from traceml.database.row_arrays import join_rows
from traceml.database.store.reader import StreamRecord

__all__ = ["WaitingRows"]

_MAX_ROWS = 32_768  # of all ranks: 1 to 3 MB


class WaitingRows:
    """Collects rows by stream and table, and hands them on in blocks.

    Args:
        write: writes a block of rows of a stream's table.
        block: rows of a block, at most.
    """

    def __init__(self, write: Callable[[StreamRecord, str, Any], None], block: int) -> None:
        self._write, self._block = write, block
        self._rows: dict[tuple[int, str], tuple[StreamRecord, list[Any]]] = {}
        self._waiting = 0

    def add(self, stream: StreamRecord, table: str, rows: Any) -> None:
        """Take rows of a table; they are written sometime later."""
        self._rows.setdefault((stream.id, table), (stream, []))[1].append(rows)
        self._waiting += len(rows)
        if self._waiting >= _MAX_ROWS:
            self.write()

    def write(self) -> None:
        """Write the waiting rows."""
        waiting, self._rows, self._waiting = self._rows, {}, 0
        for (_, table), (stream, parts) in waiting.items():
            rows = join_rows(parts)
            for start in range(0, len(rows), self._block):
                self._write(stream, table, rows[start : start + self._block])
