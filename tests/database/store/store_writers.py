"""A process that writes a store until it is killed.

    python -m tests.database.store.store_writers STORE ROWS_PER_FRAME ROWS [WAIT]

It continues at the row that the store expects, prints `OPEN <next>` and, after each commit, `ACKED <next>`. It ends by
itself at ROWS rows. With WAIT it goes on after WAIT rows only when a line comes in.
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import msgpack

from traceml.database.schema import EVALS
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter

STREAMS = 3
_INTERIOR = 5  # the first byte of a page of SQLite that has only the numbers of others


def identity(rank: int) -> StreamIdentity:
    """Return the identity under which the writer stores a rank, every time."""
    return StreamIdentity(rank, 0, "here", 100 + rank, 5)


def row(rank: int, seq: int) -> tuple[int, ...]:
    """Return the row that a rank has at a number."""
    return seq, seq * 3, rank, seq * 7, 0, 0


def frame(rank: int, seq: int, n: int) -> bytes:
    """Return rows as they would come over the wire."""
    return b"".join(EVALS.struct.pack(*row(rank, number)) for number in range(seq, seq + n))


def erase_newest_frames(path: Path) -> None:
    """Fill the newest frames of a store with zeros, as SQLite reads the end of a file that was cut off in a page."""
    with closing(sqlite3.connect(path)) as database:
        [(page,)] = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'frames'")
        [(size,)] = database.execute("PRAGMA page_size")

    data = bytearray(path.read_bytes())
    while data[(page - 1) * size] == _INTERIOR:
        page = int.from_bytes(data[(page - 1) * size + 8 :][:4], "big")  # its last child

    begin = (page - 1) * size
    newest = int.from_bytes(data[begin + 5 :][:2], "big")  # where the rows of the page begin, the newest first
    half = (size - newest) // 2
    data[begin + newest : begin + newest + half] = bytes(half)
    path.write_bytes(data)


def write(path: Path, rows_per_frame: int, rows: int, wait: int = 0) -> None:
    """Append and commit, in turns."""
    writer = StoreWriter(path)
    streams = [writer.stream(identity(rank)) for rank in range(STREAMS)]
    seq = writer.next_seq(streams[0], "evals")
    print("OPEN", seq, flush=True)
    while seq < rows:
        for rank, stream in enumerate(streams):
            assert writer.next_seq(stream, "evals") == seq
            writer.append(stream, "evals", seq, rows_per_frame, frame(rank, seq, rows_per_frame))
            writer.append(stream, "info", writer.next_seq(stream, "info"), 1, msgpack.packb({"seq": seq}))

        writer.commit()
        writer.maintain(0.01)
        seq += rows_per_frame
        print("ACKED", seq, flush=True)
        if seq == wait:
            sys.stdin.readline()

    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
