"""Changes to stored frames: merged into larger ones, thinned, summed.

Changes are computed at any time, and written together. A minute's frames of all ranks are adjacent in the
file, so that each page of it is written once, not once per rank.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import msgpack
import numpy as np

from traceml.database.schema import LINES, LOSSES, SAMPLED_TABLES, Table
from traceml.database.store.frame_compression import encode
from traceml.database.store.records import (
    FRAME_COLUMNS,
    FRAME_OVERHEAD_BYTES,
    FRAME_ROWS,
    Frame,
    decoded_frame,
    step_offset,
)
from traceml.database.store.summaries import STEP_TABLES, TableSums, sum_rows
from traceml.database.store.thinning import thinned_rows

__all__ = ["SUMMED", "THINNED", "FrameEditor"]

SUMMED = frozenset(table.name for table in (*STEP_TABLES, *SAMPLED_TABLES))
"""Tables whose rows are summed."""
THINNED = SUMMED | {LINES.name, LOSSES.name}
"""Tables whose old rows may be thinned."""

# A transaction of this many takes some 30 ms.
_MAX_FRAMES = 10_000
_MAX_BYTES = 16 << 20

_UPDATE = "UPDATE frames SET seq = ?, n = ?, first_step = ?, last_step = ?, codec = ?, data = ? WHERE id = ?"
_UPSERT_SUMS = (
    "INSERT INTO summaries (tbl, stream, next_seq, after_id, data) VALUES (?, ?, ?, ?, ?) ON CONFLICT (tbl, stream) "
    "DO UPDATE SET next_seq = excluded.next_seq, after_id = excluded.after_id, data = excluded.data"
)
_ADD_EMPTIED = (
    "INSERT INTO emptied (tbl, stream, rows, next_seq) VALUES (?, ?, ?, ?) ON CONFLICT (tbl, stream) "
    "DO UPDATE SET rows = rows + excluded.rows, next_seq = max(next_seq, excluded.next_seq)"
)
_QUERY = f"SELECT {FRAME_COLUMNS} FROM {FRAME_ROWS} WHERE frames.id IN ({{}}) ORDER BY frames.id"  # noqa: S608 - no values


class FrameEditor:
    """Reads frames of packed tables, and collects changes to them. A frame is changed once before they are written."""

    def __init__(self, database: sqlite3.Connection, tables: dict[str, int]) -> None:
        self._database = database
        self._tables = tables
        self._gone: list[int] = []
        self._gone_thinned: list[int] = []
        self._rows: list[tuple[Any, ...]] = []
        self._thinned: list[tuple[int, int]] = []
        self._sums: list[tuple[Any, ...]] = []
        self._meta: list[tuple[str, bytes]] = []
        self._empty: dict[tuple[int, int], tuple[int, int]] = {}
        self._bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether no changes wait."""
        return not (self._rows or self._sums or self._meta or self._gone)

    @property
    def is_large(self) -> bool:
        """Whether so many changes wait that they have to be written now."""
        return len(self._gone) >= _MAX_FRAMES or self._bytes >= _MAX_BYTES

    def write(self) -> None:
        """Write all changes, in the caller's transaction."""
        database = self._database
        database.executemany("DELETE FROM frames WHERE id = ?", [(number,) for number in sorted(self._gone)])
        database.executemany("DELETE FROM thinnings WHERE id = ?", [(number,) for number in self._gone_thinned])
        database.executemany(_UPDATE, sorted(self._rows, key=itemgetter(-1)))
        database.executemany("INSERT OR REPLACE INTO thinnings (id, thinned) VALUES (?, ?)", self._thinned)
        database.executemany(_UPSERT_SUMS, self._sums)
        database.executemany(_ADD_EMPTIED, [(*key, *counts) for key, counts in sorted(self._empty.items())])
        database.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", self._meta)

    def clear(self) -> None:
        """Forget the changes, after they were written."""
        for waiting in (self._gone, self._gone_thinned, self._rows, self._thinned, self._sums, self._meta, self._empty):
            waiting.clear()

        self._bytes = 0

    def put_meta(self, key: str, value: Any) -> None:
        """Set a fact of the run."""
        self._meta.append((key, msgpack.packb(value)))

    def load(self, table: Table, numbers: Sequence[int]) -> list[Frame]:
        """Return frames by id, in order; those that are gone are missing.

        Raises:
            ValueError: one of them is damaged.
        """
        query = _QUERY.format(",".join("?" * len(numbers)))
        rows = self._database.execute(query, list(numbers)).fetchall()
        return [decoded_frame(table.name, row, table.row_bytes) for row in rows]

    def merge(self, table: Table, frames: Sequence[Frame]) -> Frame:
        """Replace consecutive frames of a stream by one, which has the id of the last."""
        last = frames[-1]
        with_steps = [frame for frame in frames if frame.n] or [last]
        merged = replace(
            last,
            seq=frames[0].seq,
            n=sum(frame.n for frame in frames),
            first_step=with_steps[0].first_step,
            last_step=with_steps[-1].last_step,
            data=b"".join(frame.data for frame in frames),
            thinned=sum(frame.thinned for frame in frames),
        )
        self._gone += [frame.id for frame in frames[:-1]]
        self._gone_thinned += [frame.id for frame in frames[:-1] if frame.thinned]
        return self._replace(table, merged)

    def thin(self, table: Table, frame: Frame, level: int) -> Frame:
        """Remove the rows of a frame that do not stay at a level, or all of it; return what is left."""
        left = thinned_rows(table.name, np.frombuffer(frame.data, table.dtype), level)
        if not len(left):
            return self._emptied(table, frame)
        if len(left) == frame.n:
            return frame

        has_steps = step_offset(table.dtype) is not None
        thinned = replace(
            frame,
            n=len(left),
            first_step=int(left["step"][0]) if has_steps else frame.first_step,
            last_step=int(left["step"][-1]) if has_steps else frame.last_step,
            data=left.tobytes(),
            thinned=frame.thinned + frame.n - len(left),
        )
        return self._replace(table, thinned)

    def add_sums(self, table: Table, frames: Sequence[Frame]) -> None:
        """Add consecutive frames of a stream to the stored sums of its table."""
        stream, number = frames[0].stream, self._tables[table.name]
        query = "SELECT next_seq, data FROM summaries WHERE tbl = ? AND stream = ?"
        found = self._database.execute(query, (number, stream)).fetchone()
        next_seq = found[0] if found else 0
        new = [frame for frame in frames if frame.seq >= next_seq]
        rows = np.frombuffer(b"".join(frame.data for frame in new), table.dtype)
        sums = sum_rows(table.name, rows).get(0, TableSums.empty(table))
        if found:
            sums = TableSums.decoded(table.name, found[1]).join(sums)

        encoded = sums.encoded()
        self._bytes += len(encoded)
        self._sums.append((number, stream, max(frames[-1].end, next_seq), frames[-1].id, encoded))

    def _emptied(self, table: Table, frame: Frame) -> Frame:
        """Remove a frame. Its rows stay counted: those that are missing otherwise are lost."""
        self._gone.append(frame.id)
        if frame.thinned:
            self._gone_thinned.append(frame.id)

        key = (self._tables[table.name], frame.stream)
        rows, end = self._empty.get(key, (0, 0))
        self._empty[key] = (rows + frame.n + frame.thinned, max(frame.end, end))
        return replace(frame, n=0, data=b"", size=0)

    def _replace(self, table: Table, frame: Frame) -> Frame:
        codec, data = encode(table, frame.data)
        self._rows.append((frame.seq, frame.n, frame.first_step, frame.last_step, int(codec), data, frame.id))
        self._bytes += len(data)
        if frame.thinned:
            self._thinned.append((frame.id, frame.thinned))

        return replace(frame, size=len(data) + FRAME_OVERHEAD_BYTES)
