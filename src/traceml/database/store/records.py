"""Records of a run's store: streams, frames of rows, events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import Any, NamedTuple

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.store.frame_compression import decode
from traceml.errors import StoreError

__all__ = [
    "FRAME_COLUMNS", "FRAME_OVERHEAD_BYTES", "FRAME_ROWS", "Frame", "NextRows", "RunEvent", "StreamIdentity",
    "StreamRecord", "assembled", "decoded_frame", "dtype_of", "in_ranges", "names_of", "rows_of", "step_offset",
]  # fmt: skip

FRAME_COLUMNS = "frames.id, stream, seq, n, first_step, last_step, codec, data, coalesce(thinned, 0)"
FRAME_ROWS = "frames LEFT JOIN thinnings ON thinnings.id = frames.id"
FRAME_OVERHEAD_BYTES = 40
"""Bytes of a frame in the store in addition to its rows: header and index, measured."""

NextRows = dict[tuple[str, int], int]
"""Of a pass over frames, the number of the next row by table and stream."""


class StreamIdentity(NamedTuple):
    """One process of a rank. Its rows are numbered from 0 in each table.

    `recorder` distinguishes consecutive recorders of one process; "" where there is only one.
    """

    rank: int
    attempt: int
    host: str
    pid: int
    start_ticks: int
    recorder: str = ""


class StreamRecord(msgspec.Struct, frozen=True):
    """A stored stream."""

    id: int
    identity: StreamIdentity
    facts: dict[str, Any]  # facts from the aggregator: world size, local rank, clock, state, exit, …

    @property
    def rank(self) -> int:
        """The rank."""
        return self.identity.rank

    @property
    def attempt(self) -> int:
        """Number of restarts of the job so far."""
        return self.identity.attempt

    @property
    def host(self) -> str:
        """The host's name."""
        return self.identity.host

    @property
    def is_rank(self) -> bool:
        """Whether it is of a rank, not of a process that only logs for one."""
        return not self.facts.get("helps")

    @property
    def state(self) -> str:
        """The last state from the aggregator; `running` before any."""
        return str(self.facts.get("state", "running"))

    def appended(self, table: str) -> int:
        """Number of rows of a table that its rank had appended when it ended; 0 if unknown."""
        totals = self.facts.get("appended")
        rows = totals.get(table) if isinstance(totals, dict) else None
        return rows if isinstance(rows, int) else 0


class RunEvent(msgspec.Struct, frozen=True):
    """An event of the run; `id` is the cursor."""

    id: int
    epoch_ns: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Consecutive rows of one table of a stream; `id` is the cursor.

    `thinned` rows of them were removed because of their age; `n` are left, the first of them not always number `seq`.
    """

    id: int
    stream: int
    table: str
    seq: int
    n: int
    first_step: int
    last_step: int
    data: bytes
    thinned: int = 0
    size: int = field(default=0, compare=False)
    """Bytes that it takes in the store."""

    @property
    def end(self) -> int:
        """Number of the row after it."""
        return self.seq + self.n + self.thinned

    def after(self, seq: int, step_at: int | None = None) -> Frame:
        """Return the frame of a packed table without the rows before number `seq`.

        Of a frame with thinned rows, whose numbers are not known, none are left.

        Args:
            step_at: offset of the step in a row, None for a table without steps.
        """
        if seq <= self.seq:
            return self

        rows = min(seq - self.seq, self.n) if not self.thinned else self.n
        data = self.data[rows * (len(self.data) // self.n) :] if rows < self.n else b""
        first = self.first_step if step_at is None or not data else _INT.unpack_from(data, step_at)[0]
        return replace(self, seq=self.seq + rows, n=self.n - rows, first_step=first, data=data)

    def maps(self) -> list[dict[str, Any]]:
        """Return a log's rows.

        Raises:
            StoreError: the bytes are damaged.
        """
        unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
        try:
            unpacker.feed(self.data)
            rows = list(unpacker)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise StoreError(f"frame {self.id} of {self.table} is damaged: {error}") from error

        if not all(isinstance(row, dict) for row in rows):
            raise StoreError(f"frame {self.id} of {self.table} is damaged: it holds values that are not maps")

        if len(rows) != self.n:  # the last one is cut off: iterating only stops
            raise StoreError(f"frame {self.id} of {self.table} is damaged: it holds {len(rows)} of {self.n} maps")

        return rows


_INT = Struct("<q")


def decoded_frame(table: str, row: tuple[Any, ...], row_bytes: int | None) -> Frame:
    """Return a frame with its rows decoded.

    Args:
        row: its `FRAME_COLUMNS`.
        row_bytes: size of a row of a packed table; None for a log.

    Raises:
        ValueError: it is damaged.
    """
    number, stream, seq, n, first, last, codec, data, thinned = row
    try:
        decoded = decode(codec, data, row_bytes or 1)
    except ValueError as error:
        raise ValueError(f"frame {number} of {table}: {error}") from error

    if row_bytes is not None and len(decoded) != n * row_bytes:
        raise ValueError(f"frame {number} of {table} has {len(decoded)} bytes for {n} rows")

    return Frame(
        id=number,
        stream=stream,
        table=table,
        seq=seq,
        n=n,
        first_step=first,
        last_step=last,
        data=decoded,
        thinned=thinned,
        size=len(data) + FRAME_OVERHEAD_BYTES,
    )


def dtype_of(layout: Any) -> np.dtype[Any] | None:
    """Return a stored layout as a numpy dtype, None for a log."""
    if isinstance(layout, str):
        return None

    return np.dtype([(name, "<i8" if code == "q" else "<f8") for name, code in layout])


def step_offset(dtype: np.dtype[Any] | None) -> int | None:
    """Return the offset of the step in a row, None for a table without steps."""
    if dtype is None or dtype.fields is None or "step" not in dtype.fields:
        return None

    return dtype.fields["step"][1]


def in_ranges(steps: NDArray[np.int64], ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which steps are in ranges, (first, last) in order."""
    at = np.searchsorted(ranges[:, 1], steps)
    inside = at < len(ranges)
    inside[inside] = ranges[at[inside], 0] <= steps[inside]
    return inside


def names_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield id and name of rows of `schema.NAMES`; a row that is none is left out, as other rows are good."""
    for row in rows:
        number, name = row.get("id"), row.get("name")
        if isinstance(number, int) and isinstance(name, str):
            yield number, name


def rows_of(frames: Sequence[Frame], dtype: np.dtype[Any]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return the rows of frames, and the stream of each."""
    rows = np.frombuffer(b"".join(frame.data for frame in frames), dtype)
    return rows, np.repeat([frame.stream for frame in frames], [frame.n for frame in frames])


def assembled(frames: list[Frame], dtype: np.dtype[Any], last: int | None) -> NDArray[np.void]:
    """Join frames into one array, the stream id as first column; sorted by stream where `last` is given."""
    source, streams = rows_of(frames, dtype)
    joined = np.empty(len(source), np.dtype([("stream", "<i8"), *dtype.descr]))
    joined["stream"] = streams
    for name in dtype.names or ():
        joined[name] = source[name]

    if last is None or not len(joined):
        return joined

    joined = joined[np.argsort(joined["stream"], kind="stable")]
    _, counts = np.unique(joined["stream"], return_counts=True)
    keep = np.concatenate([np.arange(count) >= count - last for count in counts])
    kept: NDArray[np.void] = joined[keep]
    return kept
