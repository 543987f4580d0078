"""Maintenance of a store while it is written: summing, merging and thinning, a few milliseconds at a time."""

from __future__ import annotations

import logging
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from traceml.database.schema import METRICS
from traceml.database.store.compaction import FANOUT, Compaction
from traceml.database.store.frame_editor import SUMMED, THINNED, FrameEditor
from traceml.database.store.records import FRAME_OVERHEAD_BYTES
from traceml.database.store.retention import Retention, ThinnedFrame
from traceml.errors import StoreError
from traceml.fail_open import fail_open

__all__ = ["Maintenance"]

# Frames that a delivery has not read stay as they are, so that a batch that is read again is the same. After this long,
# steps and samples are merged, and thinned, anyway.
_MERGE_ANYWAY_S = 3600.0
_THIN_ANYWAY_S = 24 * 3600.0
# Rows that live views may still read stay complete.
_RECENT_S = 600.0
_CLOCK_S = 60.0
# After a failure, typically of a full disk.
_PAUSE_S = 60.0
_MANY_ROWS = 1024
_ALL = 1 << 62

_log = logging.getLogger("traceml")


class _IdClock:
    """Times at which frames were written, to a minute."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._frames: list[int] = []

    def record(self, now_s: float, frame: int) -> None:
        """Record the newest frame."""
        if self._times_s and now_s - self._times_s[-1] < _CLOCK_S:
            return

        self._times_s.append(now_s)
        self._frames.append(frame)
        old = bisect_right(self._times_s, now_s - 2 * _THIN_ANYWAY_S)
        del self._times_s[:old], self._frames[:old]

    def before(self, time_s: float) -> int:
        """Return the newest frame known to have been written before a time, 0 if none is."""
        at = bisect_right(self._times_s, time_s)
        return self._frames[at - 1] if at else 0


class Maintenance:
    """Maintenance of one store."""

    def __init__(self, path: Path, database: sqlite3.Connection, tables: dict[str, int]) -> None:
        self._path = path
        self._database = database
        self._tables = tables
        self._clock = _IdClock()
        self._last_id = 0
        self._broken_s: float | None = None
        self._resume()

    def record(self, stream: int, table: str, frame: int, rows: int, size: int, now_s: float) -> None:
        """Take a frame that was committed, in the order of ids."""
        self._last_id = frame
        if self._broken_s is not None:
            return

        self.compaction.record(stream, table, frame, rows, now_s)
        if table in THINNED:
            self.retention.resized(size + FRAME_OVERHEAD_BYTES, frame)

    def run(self, budget_s: float, now_s: float, cursors: Sequence[int] = (), limit_bytes: int | None = None) -> bool:
        """Work for a while; return whether something is left to do.

        Raises:
            sqlite3.Error: nothing of the last transaction was written; typically the disk is full.
        """
        if self._broken_s is not None:
            if now_s - self._broken_s < _PAUSE_S:
                return False

            self._resume()

        self._clock.record(now_s, self._last_id)
        until_s = time.perf_counter() + budget_s
        while time.perf_counter() < until_s:
            with fail_open(
                _log, "database", f"damage in the run's store {self._path}", once=True, reraise=sqlite3.Error
            ):
                if not self._step(now_s, cursors, limit_bytes):
                    return False

            if self._broken_s is not None:
                return False

        return True

    def _step(self, now_s: float, cursors: Sequence[int], limit_bytes: int | None) -> bool:
        """Do a few milliseconds of work; return whether there was any. Changes of a round are written together."""
        if self._editor.is_large:
            self._write(now_s)
        elif (due := self.compaction.next_due()) is not None:
            self._compact(*due, now_s, cursors)
        elif not self._editor.is_empty and (not self.retention.is_thinning or self.compaction.has_due_work):
            self._write(now_s)
        elif not self.compaction.begin_round(now_s):
            return self._thin(now_s, cursors, limit_bytes)

        return True

    def _compact(self, key: tuple[int, str], level: int, now_s: float, cursors: Sequence[int]) -> None:
        up_to = min(cursors, default=_ALL)
        if key[1] != METRICS.name:
            up_to = max(up_to, self._clock.before(now_s - _MERGE_ANYWAY_S))
        elif cursors:
            up_to = 0  # trackers know logged values by frame and row

        with self._reporting_damage():
            self.compaction.run(key, level, up_to, cursors)

    def _thin(self, now_s: float, cursors: Sequence[int], limit_bytes: int | None) -> bool:
        up_to = self._clock.before(now_s - _RECENT_S)
        if cursors:
            up_to = max(min(*cursors, up_to), self._clock.before(now_s - _THIN_ANYWAY_S))

        if not self.retention.is_thinning:
            if not self.retention.begin(limit_bytes, self._last_id, up_to):
                return False

            self.compaction.forget_thinned()

        with self._reporting_damage():
            self._thinned += self.retention.run()

        return True

    def _write(self, now_s: float) -> None:
        """Write the changes in a transaction. After a failure all starts over from the store."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._editor.write()
            self._database.execute("COMMIT")
        except BaseException:
            self._broken_s = now_s
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

            raise

        self._editor.clear()
        self.compaction.after_commit()
        for frame in self._thinned:
            self.compaction.take_thinned(*frame)

        self._thinned.clear()

    @contextmanager
    def _reporting_damage(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise StoreError(f"{error}; the frames next to it stay as they are.") from error

    def _resume(self) -> None:
        """Schedule the small frames that the store has."""
        self._editor = FrameEditor(self._database, self._tables)
        self._thinned: list[ThinnedFrame] = []
        self.retention = Retention(self._database, self._editor, self._tables)
        self.compaction = Compaction(self._editor, self.retention.resized)
        self._broken_s = None
        names = {number: name for name, number in self._tables.items()}
        query = "SELECT tbl, stream, after_id FROM summaries"
        summed = {(number, stream): after for number, stream, after in self._database.execute(query)}
        now_s = time.monotonic()
        for frame, stream, number, rows in self._database.execute("SELECT id, stream, tbl, n FROM frames ORDER BY id"):
            table = names.get(number, "")
            is_new = frame > summed.get((number, stream), 0) if table in SUMMED else rows < FANOUT
            level = 0 if is_new else 1 if rows < _MANY_ROWS else 2
            self.compaction.resume(stream, table, frame, rows, level=level, now_s=now_s)
            self._last_id = frame
