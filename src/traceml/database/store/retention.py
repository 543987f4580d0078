"""Thinning of old rows, so that a run of any length takes bounded space.

When steps and samples take more than their share, the older half of the complete rows is thinned to the level of the
rows that were thinned before. When thinned rows take more than half of the share, their level rises by one, which
halves them. What stays are blocks of steps spread over the run, the same on every rank; the run's sums stay exact.
See `thinning`.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

import msgpack
import msgspec

from traceml.database.schema import TABLES, Table
from traceml.database.store.compaction import FULL_ROWS
from traceml.database.store.frame_editor import SUMMED, THINNED, FrameEditor
from traceml.database.store.records import FRAME_OVERHEAD_BYTES, Frame
from traceml.database.store.thinning import STATE_KEY

__all__ = ["Retention", "ThinnedFrame"]

_BATCH = 16


class _ThinningPass(msgspec.Struct):
    """A walk over all frames between two ids, table by table."""

    first: int
    last: int
    level: int
    tables: list[str] = msgspec.field(default_factory=lambda: sorted(THINNED))
    after: int = -1
    summed: dict[int, int] = {}


class ThinnedFrame(NamedTuple):
    """A small frame that is left of thinned rows."""

    stream: int
    table: str
    id: int
    rows: int


class Retention:
    """Thins the rows of summed tables."""

    def __init__(self, database: sqlite3.Connection, editor: FrameEditor, tables: dict[str, int]) -> None:
        self._database = database
        self._editor = editor
        self._tables = {name: tables[name] for name in THINNED}
        self._pass: _ThinningPass | None = None
        found = database.execute("SELECT value FROM meta WHERE key = ?", (STATE_KEY,)).fetchone()
        state = msgpack.unpackb(found[0]) if found else {}
        self.level: int = state.get("level", 0)
        """Level to which old rows are thinned; 0 before any were."""
        self.up_to: int = state.get("frame", 0)
        """Id of the last frame that is thinned."""
        self._old_bytes, self._recent_bytes = self._measure()

    def resized(self, change_bytes: int, frame: int) -> None:
        """Count a frame that was added, or changed in size."""
        if frame <= self.up_to:
            self._old_bytes += change_bytes
        else:
            self._recent_bytes += change_bytes

    @property
    def is_thinning(self) -> bool:
        """Whether a pass over the old frames has begun and not ended."""
        return self._pass is not None

    def begin(self, limit_bytes: int | None, last_id: int, up_to: int) -> bool:
        """Begin a pass if the rows take too much; return whether it has begun.

        Args:
            limit_bytes: most bytes of rows; None keeps all.
            up_to: rows of frames after this id stay complete.
        """
        if limit_bytes is not None and self._old_bytes + self._recent_bytes > limit_bytes:
            self._pass = self._plan(limit_bytes, last_id, up_to)

        if self._pass is not None:
            # Saved before the first frame is thinned: readers take only what stays at this level.
            self.level = self._pass.level
            self._save()

        return self.is_thinning

    def run(self) -> list[ThinnedFrame]:
        """Thin the next frames of the pass; return those that are small now, for when the changes are written.

        Raises:
            ValueError: one of them is damaged; they stay as they are.
        """
        walk = self._pass
        if walk is None:
            return []

        if not walk.tables:
            self._finish(walk)
            return []

        name, frames = self._next_frames(walk)
        thinned = [self._thin(name, frame, walk.level) for frame in frames]
        small = [frame for frame in thinned if 0 < frame.n < FULL_ROWS // 2]
        return [ThinnedFrame(frame.stream, name, frame.id, frame.n) for frame in small]

    def _plan(self, limit_bytes: int, last_id: int, up_to: int) -> _ThinningPass | None:
        if self._old_bytes > limit_bytes // 2:
            return _ThinningPass(0, self.up_to, self.level + 1)

        middle = min(self.up_to + (last_id - self.up_to) // 2, up_to)
        return _ThinningPass(self.up_to, middle, max(self.level, 1)) if middle > self.up_to else None

    def _next_frames(self, walk: _ThinningPass) -> tuple[str, list[Frame]]:
        """Return the next frames of a pass, all of one table, without those that are not in the sums yet."""
        name = walk.tables[0]
        if walk.after < walk.first:
            walk.after = walk.first
            query = "SELECT stream, after_id FROM summaries WHERE tbl = ?"
            walk.summed = dict(self._database.execute(query, (self._tables[name],)))

        query = "SELECT id, stream FROM frames WHERE tbl = ? AND id > ? AND id <= ? ORDER BY id LIMIT ?"
        found = self._database.execute(query, (self._tables[name], walk.after, walk.last, _BATCH)).fetchall()
        if len(found) < _BATCH:
            walk.tables.pop(0)
            walk.after = -1
        else:
            walk.after = found[-1][0]

        ready = [number for number, stream in found if name not in SUMMED or number <= walk.summed.get(stream, 0)]
        return name, self._editor.load(_table(name), ready)

    def _thin(self, name: str, frame: Frame, level: int) -> Frame:
        self.resized(-frame.size, frame.id)
        thinned = self._editor.thin(_table(name), frame, level)
        self._old_bytes += thinned.size
        return thinned

    def _finish(self, walk: _ThinningPass) -> None:
        self.up_to = max(walk.last, self.up_to)
        self._save()
        self._pass = None

    def _save(self) -> None:
        self._editor.put_meta(STATE_KEY, {"level": self.level, "frame": self.up_to})

    def _measure(self) -> tuple[int, int]:
        """Return the bytes of frames up to `up_to`, and of those after it."""
        marks = ",".join("?" * len(self._tables))
        query = f"SELECT coalesce(sum(length(data) + ?), 0) FROM frames WHERE tbl IN ({marks}) AND id "  # noqa: S608
        values = (FRAME_OVERHEAD_BYTES, *self._tables.values(), self.up_to)
        old, recent = (self._database.execute(query + end, values).fetchone()[0] for end in ("<= ?", "> ?"))
        return int(old), int(recent)


def _table(name: str) -> Table:
    table = TABLES[name]
    assert isinstance(table, Table), "only packed tables are summed"
    return table
