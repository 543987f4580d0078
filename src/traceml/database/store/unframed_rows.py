"""Buffer in the store for rows of a large job, which are committed before they become frames.

Ten thousand ranks that send a row a second would fill the store with frames of one row, and merging them later writes
most pages of the store again. So the rows of such a job are committed as they come, those of all ranks in one record,
and become frames after some seconds: each page of frames is written once. A writer that is killed leaves the records to
the next one.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import msgpack
import msgspec

from traceml.database.schema import INFO
from traceml.database.store.frame_compression import decode, encode

__all__ = ["FRAME_WAIT_S", "DueFrame", "FrameBuffer", "IncomingRows", "UnframedRows"]

FRAME_WAIT_S = 10.0
"""How long rows wait for others of their frame."""
_MAX_ROWS = 4096
_MAX_BYTES = 32 << 20
# Frames of all ranks are spread over this many commits: together they would delay an acknowledgment.
_COMMITS = 20
_MIN_FRAMES = 64

_log = logging.getLogger("traceml")

_Key = tuple[int, str]


class FrameBuffer(msgspec.Struct):
    """Consecutive rows of one (stream, table) that become a frame."""

    seq: int
    n: int = 0
    parts: list[bytes] = []
    first_step: int = -1
    last_step: int = -1
    packed: tuple[int, bytes] | None = None
    """Codec and bytes of the rows, if they came so in one part."""

    def add(
        self, n: int, data: bytes, first_step: int, last_step: int, packed: tuple[int, bytes] | None = None
    ) -> None:
        """Add the rows that follow."""
        self.packed = None if self.parts else packed
        self.n += n
        self.parts.append(data)
        self.last_step = last_step
        if self.first_step == -1:
            self.first_step = first_step


class IncomingRows(NamedTuple):
    """Consecutive rows as they came; see `StoreWriter.append`."""

    stream: int
    table: str
    seq: int
    n: int
    data: bytes
    first_step: int
    last_step: int


class DueFrame(NamedTuple):
    """Rows that are to be written as a frame."""

    key: _Key
    rows: FrameBuffer


class UnframedRows:
    """Holds rows until they become frames, and their records in the store."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._open: dict[_Key, FrameBuffer] = {}
        self._closing: dict[_Key, FrameBuffer] = {}
        self._early: list[DueFrame] = []
        self._new: list[IncomingRows] = []
        self._now_s = self._since_s = 0.0
        self._open_bytes = 0
        self._share = _MIN_FRAMES
        self._last_record = self._closing_record = self._done_record = 0

    def stored(self) -> Iterator[IncomingRows]:
        """Yield the rows that an earlier writer has left, in the order in which they came; damaged ones are lost."""
        for number, codec, data in self._database.execute("SELECT id, codec, data FROM spool ORDER BY id"):
            self._last_record = number
            try:
                rows = [IncomingRows(*row) for row in msgpack.unpackb(decode(codec, data, 1))]
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                _log.warning("damaged rows of a run's store are left out: %s", error)
                continue

            yield from rows

    def add(self, rows: IncomingRows, *, is_stored: bool = False) -> None:
        """Hold rows; the next transaction stores them, unless they are."""
        key = (rows.stream, rows.table)
        buffer = self._open.get(key)
        if buffer is not None and (rows.seq != buffer.seq + buffer.n or buffer.n + rows.n > _MAX_ROWS):
            waiting = [rows for rows in (self._closing, self._open) if key in rows]
            self._early += [DueFrame(key, rows.pop(key)) for rows in waiting]
            buffer = None

        if buffer is None:
            if not self._open:
                self._since_s = self._now_s

            buffer = self._open[key] = FrameBuffer(rows.seq)

        buffer.add(rows.n, rows.data, rows.first_step, rows.last_step)
        self._open_bytes += len(rows.data)
        if not is_stored:
            self._new.append(rows)

    def drain(self, now_s: float, *, everything: bool = False) -> list[DueFrame]:
        """Return the rows whose frames are due, in the order of their numbers, for the next transaction.

        Args:
            everything: whether no rows may wait any longer.
        """
        self._now_s = now_s
        frames, self._early = self._early, []
        if everything:
            self._share = len(self._closing)
            frames += self._due()

        is_time = everything or now_s - self._since_s >= FRAME_WAIT_S or self._open_bytes >= _MAX_BYTES
        if self._open and not self._closing and is_time:
            self._closing, self._open, self._open_bytes = self._open, {}, 0
            self._closing_record = self._last_record + bool(self._new)
            self._share = len(self._closing) if everything else max(len(self._closing) // _COMMITS, _MIN_FRAMES)

        return frames + self._due()

    @property
    def has_work(self) -> bool:
        """Whether there is something for the next transaction, other than the frames that were taken."""
        return bool(self._new or self._done_record)

    def write(self) -> None:
        """Store the new rows, and remove the records of those that have become frames, in the caller's transaction."""
        if self._new:
            codec, data = encode(INFO, msgpack.packb(self._new))
            statement = "INSERT INTO spool (id, codec, data) VALUES (?, ?, ?)"
            self._database.execute(statement, (self._last_record + 1, int(codec), data))

        if self._done_record:
            self._database.execute("DELETE FROM spool WHERE id <= ?", (self._done_record,))

    def after_commit(self) -> None:
        """Take over what was written, after the transaction."""
        self._last_record += bool(self._new)
        self._new.clear()
        if self._done_record:
            self._done_record = self._closing_record = 0

    def _due(self) -> list[DueFrame]:
        frames = [DueFrame(key, self._closing.pop(key)) for key in list(self._closing)[: self._share]]
        if not self._closing:
            self._done_record = self._closing_record

        return frames
