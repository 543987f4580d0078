"""Table of the chunks of spooled files, for an aggregator that cannot read the spool."""

from __future__ import annotations

import os
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import msgpack

from traceml.database.flight.row_rings import RowSlice
from traceml.database.schema import BLOBS

__all__ = ["BlobTable"]

_CHUNK_BYTES = 1 << 20


class BlobTable:
    """Files in the spool as rows of chunks, for an aggregator on another host."""

    name = BLOBS.name

    def __init__(self) -> None:
        self.appended = self.sent = self.dropped = 0
        self._acked = 0
        self._files: deque[tuple[int, int, Path, int]] = deque()  # (first row, rows, path, bytes)
        self._ends: dict[str, int] = {}  # of each file, by its name, which is made of its contents

    @property
    def acked(self) -> int:
        """Rows below this number have arrived."""
        return self._acked

    @acked.setter
    def acked(self, seq: int) -> None:
        self._acked = seq
        while self._files and self._files[0][0] + self._files[0][1] <= seq:
            self._files.popleft()[2].unlink(missing_ok=True)

    def add(self, path: Path, size: int) -> int:
        """Append a file's chunks, unless the same file is known; return the number of the row after its last."""
        known = self._ends.get(path.name)
        if known is not None:
            if known <= self._acked:  # it has arrived and left the spool: this is another copy
                path.unlink(missing_ok=True)

            return known

        chunks = max(1, -(-size // _CHUNK_BYTES))
        self._files.append((self.appended, chunks, path, size))
        self.appended += chunks
        self._ends[path.name] = self.appended
        return self.appended

    def read_from(self, cursor: int, limit: int = 1) -> RowSlice:  # noqa: ARG002 - one chunk is enough for a frame
        """Return the next chunk at or after a cursor."""
        for first, n, path, size in list(self._files):
            if cursor < first + n:
                number = max(cursor, first)
                return RowSlice(number, 1, _chunk(path, (number - first) * _CHUNK_BYTES, size))

        return RowSlice(max(cursor, self.appended), 0, b"")


def _chunk(path: Path, offset: int, size: int) -> bytes:
    """Return one row of `blobs`, compressed where that saves a tenth."""
    row: dict[str, Any] = {"id": path.name, "offset": offset, "size": size}
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), _CHUNK_BYTES, offset)
    except OSError as error:
        return bytes(msgpack.packb(row | {"error": str(error)}))

    packed = zlib.compress(data, 1)
    if len(packed) < 0.9 * len(data):
        return bytes(msgpack.packb(row | {"data": packed, "zlib": True}))

    return bytes(msgpack.packb(row | {"data": data}))
