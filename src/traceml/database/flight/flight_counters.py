"""Counters of a table in a flight file whose writer is gone."""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path

from traceml.database.flight.flight_header import COUNTERS_AT
from traceml.database.flight.row_rings import COUNTERS_PER_TABLE

__all__ = ["TableCounters", "read_counters"]

_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class TableCounters:
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
