"""Batches of events as columns, names as small numbers, damage as facts: the output of reading a trace.

reader = read(["trace.pfw.gz"], args=["size"])
for batch in reader:                  # EventBatch after EventBatch: file after file, in the order of each file
    ...
reader.files, reader.strings          # complete after the iteration
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
    "FLOAT", "INTEGER", "MISSING", "NO_TIME", "TEXT", "ArgColumn", "EventBatch", "ExactTimes", "FileDamage",
    "StringTable", "TraceFileFacts",
]  # fmt: skip

ExactTimes = tuple[int | None, int | None]  # begin and duration of an event, in nanoseconds of any size
NO_TIME = -(2**63)  # in `ts_ns`: the event has no time
MISSING, INTEGER, FLOAT, TEXT = range(4)  # kinds in an ArgColumn


class StringTable:
    """Numbers of values that repeat (names, categories, processes, threads): dense from 0, never reused.

    All batches of one reader share an instance. Integers and texts are different values: 1 is not "1".
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
    """One requested key of the events' `args`.

    Args:
        kinds: MISSING, INTEGER, FLOAT or TEXT, of each event.
        integers: the value where the kind is INTEGER, else 0.
        floats: the value where the kind is INTEGER or FLOAT, else NaN.
        texts: the value's number in StringTable where the kind is TEXT (also `true`, `false`, arrays and objects as
            compact JSON, and integers beyond 64 bits), else -1.
    """

    kinds: NDArray[np.uint8]
    integers: NDArray[np.int64]
    floats: NDArray[np.float64]
    texts: NDArray[np.int32]


@dataclass(slots=True)
class EventBatch:
    """Consecutive events of one file, in the order of the file; the columns are equally long.

    Args:
        source: the number of the file: its index in `TraceReader.files`.
        ph: `ord` of the event's phase code: X, B, E, i, I, C, b, e, n, s, t, f, P, ... (dftracer's integers 1
            and 3 are X and A).
        name, cat, pid, tid: numbers in StringTable, -1 where missing. Processes and threads are integers or texts.
        id: of asynchronous and flow events (b, n, e, s, t, f, N, O, D), else -1.
        ts_ns: begin in nanoseconds of the file's clock, finer times rounded; NO_TIME where missing.
        dur_ns: nanoseconds, finer times rounded; -1 where missing.
        fractional: whether a time may have a fraction of a microsecond; otherwise all are whole microseconds.
        args: the requested keys of `args`.
        exact: begin and duration (ns, None if missing) of rows whose times do not fit in the columns, by row:
            beyond 2^63 ns, or a negative duration. The columns have them missing, or negative.
        metadata: metadata events (M, dftracer's integer 4), as parsed; in no column, and not counted as events.
    """

    source: int
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
    exact: dict[int, ExactTimes] = field(default_factory=dict)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ph)


@dataclass(frozen=True, slots=True)
class FileDamage:
    """Part of a file that could not be used, or is not reliable.

    Args:
        offset: where it begins: in bytes of the file on disk for damaged compression, else of its text.
        what: kind of damage, in a few words.
        lost_bytes: number of bytes (of the same) that were skipped; 0 if all were used nevertheless.
    """

    offset: int
    what: str
    lost_bytes: int


@dataclass(slots=True)
class TraceFileFacts:
    """Facts about a file; complete after the iteration over its batches.

    Args:
        bytes: its size on disk.
        events: number of events, metadata excluded.
        raw_bytes: its size as text.
        damage: parts that could not be used.
        header: keys other than `traceEvents` (torch.profiler's `distributedInfo`, `deviceProperties`, ...), as parsed.
    """

    path: Path
    bytes: int
    events: int = 0
    raw_bytes: int = 0
    damage: list[FileDamage] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
