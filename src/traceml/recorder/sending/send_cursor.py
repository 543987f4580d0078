"""Position of the sender in one table, and the rows that the table has overwritten before they were stored."""

from __future__ import annotations

from collections.abc import Iterator

from traceml.database.flight.row_rings import ByteLog, Ring
from traceml.recorder.sending.blob_table import BlobTable

__all__ = ["Losses", "SendCursor"]

_SLICE_ROWS = 512  # of steps, 60 kB: the thread keeps in memory what a slice and its frame once took


class Losses:
    """Rows that were overwritten before they were stored, as ranges, so that none is counted twice."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._counted = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._counted + sum(stop - start for start, stop in self._ranges)

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop); ranges are added in the order of their ends, as rings only move on."""
        while self._ranges and self._ranges[-1][1] >= start:
            last_start, last_stop = self._ranges.pop()
            start, stop = min(start, last_start), max(stop, last_stop)

        self._ranges.append((start, stop))
        if len(self._ranges) > 1024:  # rows so far back are not requested again
            first_start, first_stop = self._ranges.pop(0)
            self._counted += first_stop - first_start


class SendCursor:
    """Position in one table: rows below `sent` are on the wire."""

    def __init__(self, table: Ring | ByteLog | BlobTable) -> None:
        self.table, self.sent = table, 0
        self.losses = Losses()

    def resume(self, seq: int) -> None:
        """Continue where the aggregator says, even if it asks again for rows that it acknowledged."""
        # A number beyond the appended rows is not about this table, and would skip rows.
        self.sent = self.table.sent = self.table.acked = min(max(seq, 0), self.table.appended)

    def count_overwritten(self) -> None:
        """Count the rows that the ring has overwritten, where no more are sent."""
        first = self.table.read_from(self.table.acked, 1).first
        if first > self.table.acked:
            self.losses.add(self.table.acked, first)

    def frames(self, limit: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (first row, rows, data) up to row `limit`, moving on as they are taken."""
        while self.sent < limit:
            found = self.table.read_from(self.sent, min(_SLICE_ROWS, limit - self.sent))
            if found.first > self.sent:
                self.losses.add(self.sent, found.first)
                self.table.dropped = self.losses.rows

            if not found.n:
                self.sent = self.table.sent = max(self.sent, found.first)
                return

            self.sent = self.table.sent = found.first + found.n
            yield found.first, found.n, found.data
