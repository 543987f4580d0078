"""Duration of each kind of work, and of kinds at the same time: by process, and over time.

Spans are added in the order of their starts, so that for each unit (a process, or all of them) only the last end of
each kind is kept: memory grows with the number of units, not of spans.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.work_kinds import WORK_KINDS
from traceml.traces.native.library import grown, library, pointer

__all__ = ["BINS", "OverlapTimeline", "OverlapTimes"]

BINS = 1024
_KINDS = len(WORK_KINDS)
_FINEST_SHIFT = 10  # bins of about a microsecond, until the trace exceeds them


class OverlapTimeline:
    """Busy time by kind of work and starts of spans, in bins of 2^shift ns; bins widen as the trace gets longer."""

    def __init__(self) -> None:
        self.state = np.zeros(3 + (_KINDS + 1) * BINS, np.int64)
        self.state[0] = _FINEST_SHIFT
        self.bins = self.state[3:].reshape(_KINDS + 1, BINS)

    @property
    def width_ns(self) -> int:
        """Width of a bin."""
        return 1 << int(self.state[0])

    @property
    def begin_ns(self) -> int:
        """Begin of the first bin, by the trace's clock."""
        return int(self.state[1]) << int(self.state[0])

    def begin(self, at: int) -> None:
        """Count a span that starts at `at`."""
        if not self.state[2]:
            self.state[1:3] = at >> int(self.state[0]), 1

        self.bins[_KINDS, self._bin(at)] += 1

    def add_busy(self, mask: int, begin: int, end: int) -> None:
        """Add busy time for the kinds of `mask`."""
        self._bin(end - 1)
        while begin < end:
            number = self._bin(begin)
            until = min(end, (number + int(self.state[1]) + 1) << int(self.state[0]))
            for kind in range(_KINDS):
                self.bins[kind, number] += (until - begin) * (mask >> kind & 1)

            begin = until

    def _bin(self, at: int) -> int:
        while (at >> int(self.state[0])) - int(self.state[1]) >= BINS:
            self._widen()

        return (at >> int(self.state[0])) - int(self.state[1])

    def _widen(self) -> None:
        offset = int(self.state[1]) & 1
        folded = np.zeros_like(self.bins)
        for row, bins in zip(folded, self.bins, strict=True):
            np.add.at(row, (np.arange(BINS) + offset) >> 1, bins)

        self.bins[:] = folded
        self.state[0] += 1
        self.state[1] >>= 1


class OverlapTimes:
    """Time by set of simultaneous kinds of work, for each unit.

    Args:
        timeline: whether to keep an OverlapTimeline of all units together.
    """

    def __init__(self, *, timeline: bool = False) -> None:
        self._seen, self._cursor = np.zeros(8, np.uint8), np.zeros(8, np.int64)
        self._ends, self._masks = np.zeros((8, _KINDS), np.int64), np.zeros((8, 1 << _KINDS), np.int64)
        self.timeline = OverlapTimeline() if timeline else None

    def add(
        self, start: NDArray[np.int64], duration: NDArray[np.int64], unit: NDArray[np.int32], kind: NDArray[np.uint8]
    ) -> None:
        """Add spans that start no earlier than those before."""
        if not len(start):
            return

        self._reserve(int(unit.max()) + 1)
        columns = [np.ascontiguousarray(each) for each in (start, duration, unit, kind)]
        lib = library()
        if lib:
            state = [pointer(each) for each in (self._seen, self._cursor, self._ends, self._masks)]
            timeline = None if self.timeline is None else pointer(self.timeline.state)
            lib.traceml_overlap(ctypes.c_int64(len(start)), *map(pointer, columns), *state, timeline)
        else:
            for row in zip(*(column.tolist() for column in columns), strict=True):
                self._plain(*row)

    def finish(self) -> None:
        """Account for the open spans."""
        for unit in np.flatnonzero(self._seen).tolist():
            self._advance(unit, max(int(self._cursor[unit]), int(self._ends[unit].max())))

    def units(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the number of each unit with its time (ns) by set of kinds: bit k is kind k, 0 is idle."""
        for unit in np.flatnonzero(self._seen).tolist():
            yield unit, self._masks[unit]

    def _reserve(self, units: int) -> None:
        self._seen, self._cursor = grown(self._seen, units), grown(self._cursor, units)
        self._ends, self._masks = grown(self._ends, units), grown(self._masks, units)

    def _plain(self, start: int, duration: int, unit: int, kind: int) -> None:
        if not self._seen[unit]:
            self._seen[unit], self._cursor[unit], self._ends[unit] = 1, start, start

        self._advance(unit, start)
        self._ends[unit, kind] = max(int(self._ends[unit, kind]), start + duration)
        if self.timeline is not None:
            self.timeline.begin(start)

    def _advance(self, unit: int, to: int) -> None:
        at = int(self._cursor[unit])
        ends = self._ends[unit].tolist()
        while at < to:
            mask = sum(1 << kind for kind, end in enumerate(ends) if end > at)
            until = min([to, *(end for end in ends if end > at)])
            self._masks[unit, mask] += until - at
            if mask and self.timeline is not None:
                self.timeline.add_busy(mask, at, until)

            at = until

        self._cursor[unit] = at
