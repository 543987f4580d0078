"""What reading a trace delivers: batches of events as columns, names as small numbers, damage as facts.

`read()` of traceml.traces.reader.reading yields batches:

    reading = read(["trace.pfw.gz"], args=["size"])
    for batch in reading:                 # EventBatch after EventBatch: files one after another, each in its own order
        ...
    for value in reading.map(function):   # or: function(batch) runs in the reading threads; values in the same order
        ...
    reading.files, reading.strings        # complete when the iteration is over
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOAT",
    "INTEGER",
    "MISSING",
    "NO_TIME",
    "TEXT",
    "ArgColumn",
    "EventBatch",
    "FileDamage",
    "StringTable",
    "TraceFileFacts",
]

NO_TIME = -(2**63)  # in `ts_ns`: the event has no time
MISSING, INTEGER, FLOAT, TEXT = range(4)  # kinds in an ArgColumn


class StringTable:
    """Values that repeat (names, categories, processes, threads), each with a number: dense from 0, never reused.

    One instance serves all batches of one reading. Integers and texts are different values: 1 is not "1".
    """

    def __init__(self) -> None:
        self._ids: dict[str | int, int] = {}
        self._values: list[str | int] = []
        self._lock = threading.Lock()

    def intern(self, value: str | int | None) -> int:
        """Return the number of a value; -1 for None."""
        if value is None:
            return -1

        known = self._ids.get(value)
        return self.intern_all([value])[0] if known is None else known

    def intern_all(self, values: Iterable[str | int]) -> list[int]:
        """Return the numbers of many values at once."""
        with self._lock:
            return [self._intern(value) for value in values]

    def find(self, value: str | int) -> int | None:
        """Return the number of a value that has occurred, None for others."""
        return self._ids.get(value)

    def __getitem__(self, number: int) -> str | int | None:
        return None if number < 0 else self._values[number]

    def __len__(self) -> int:
        return len(self._values)

    def _intern(self, value: str | int) -> int:
        number = self._ids.get(value)
        if number is None:
            number = self._ids[value] = len(self._values)
            self._values.append(value)

        return number


@dataclass(slots=True)
class ArgColumn:
    """One key of the events' `args`, as asked for.

    Args:
        kinds: MISSING, INTEGER, FLOAT or TEXT, of each event.
        integers: the value where the kind is INTEGER, else 0.
        floats: the value where the kind is INTEGER or FLOAT, else NaN.
        texts: the value's number in StringTable where the kind is TEXT (also `true`, `false`, and arrays and objects as
            compact JSON), else -1.
    """

    kinds: NDArray[np.uint8]
    integers: NDArray[np.int64]
    floats: NDArray[np.float64]
    texts: NDArray[np.int32]


@dataclass(slots=True)
class EventBatch:
    """Consecutive events of one file, in the order of the file; the columns are equally long.

    Args:
        source: the number of the file: its place in `Reading.files`.
        sequence: the number of the batch within its file, from 0.
        ph: `ord` of the event's kind: X, B, E, i, I, C, b, e, n, s, t, f, P, ... (dftracer's integer 1 is X).
        name, cat, pid, tid: numbers in StringTable, -1 where missing. Processes and threads are integers or texts.
        id: of asynchronous and flow events (b, n, e, s, t, f, N, O, D), else -1.
        ts_ns: begin in nanoseconds of the file's clock, exact; NO_TIME where missing.
        dur_ns: nanoseconds, exact; -1 where missing.
        fractional: whether a time in it may have a fraction of a microsecond; otherwise all are whole microseconds.
        args: what was asked for, by key.
        odd: events that do not fit in these columns (more than three decimals, beyond 2^63 ns, negative durations, not
            finite, integers of `args` beyond 64 bits), as parsed: integers are `int`, other numbers `Decimal` (also NaN
            and infinities), `ph` is a str, the rest as JSON has it. They are in no column, and count as events.
        odd_rows: for each of `odd`, how many rows of the columns precede it.
        meta: metadata events (M, dftracer's integer 4), as parsed; in no column, and no events.
    """

    source: int
    sequence: int
    ph: NDArray[np.uint8]
    name: NDArray[np.int32]
    cat: NDArray[np.int32]
    pid: NDArray[np.int32]
    tid: NDArray[np.int32]
    id: NDArray[np.int32]
    ts_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]
    fractional: bool = False
    args: dict[str, ArgColumn] = field(default_factory=dict)
    odd: list[dict[str, Any]] = field(default_factory=list)
    odd_rows: list[int] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        """Events in it, odd ones included."""
        return len(self.ph) + len(self.odd)


@dataclass(frozen=True, slots=True)
class FileDamage:
    """A part of a file that could not be used, or not be trusted.

    Args:
        offset: where it begins: in bytes of the file as it is on disk for damaged compression, else of its text.
        what: what is wrong, in a few words.
        lost_bytes: how many bytes (of the same) were passed over; 0 where all was used nevertheless.
    """

    offset: int
    what: str
    lost_bytes: int


@dataclass(slots=True)
class TraceFileFacts:
    """What is known of a file; complete once the iteration over its batches is.

    Args:
        path: the file.
        bytes: its size on disk.
        events: events in it, metadata excluded.
        raw_bytes: its size as text.
        damage: what could not be used.
        header: keys beside `traceEvents` (torch.profiler's `distributedInfo`, `deviceProperties`, ...), as parsed.
    """

    path: Path
    bytes: int
    events: int = 0
    raw_bytes: int = 0
    damage: list[FileDamage] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
