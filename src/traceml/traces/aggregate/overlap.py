"""How long which kinds of work went on, and which at the same time: by process, and by moment.

Spans come in the order of their starts, so for each unit (a process, or all of them) only the last end of each kind
has to be known: memory is the number of units, whatever the number of spans.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.work_kinds import CLASSES
from traceml.traces.native.library import grown, library, pointer

__all__ = ["BINS", "OverlapTimeline", "OverlapTimes"]

BINS = 1024
_KINDS = len(CLASSES)
_FINEST_SHIFT = 10  # bins of about a microsecond, until more time has to fit


class OverlapTimeline:
    """Busy time by kind of work and starts of spans, in bins of 2^shift ns; bins get wider as time goes on."""

    def __init__(self) -> None:
        self.state = np.zeros(3 + (_KINDS + 1) * BINS, np.int64)
        self.state[0] = _FINEST_SHIFT
        self.bins = self.state[3:].reshape(_KINDS + 1, BINS)

    @property
    def width_ns(self) -> int:
        """How long a bin is."""
        return 1 << int(self.state[0])

    @property
    def begin_ns(self) -> int:
        """When the first bin begins, by the trace's clock."""
        return int(self.state[1]) << int(self.state[0])

    def begin(self, at: int) -> None:
        """Count a span that starts at `at`."""
        if not self.state[2]:
            self.state[1:3] = at >> int(self.state[0]), 1

        self.bins[_KINDS, self._bin(at)] += 1

    def draw(self, mask: int, begin: int, end: int) -> None:
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
        odd = int(self.state[1]) & 1
        folded = np.zeros_like(self.bins)
        for row, bins in zip(folded, self.bins, strict=True):
            np.add.at(row, (np.arange(BINS) + odd) >> 1, bins)

        self.bins[:] = folded
        self.state[0] += 1
        self.state[1] >>= 1


class OverlapTimes:
    """Time by set of kinds that were going on together, for each unit.

    Args:
        timeline: whether to keep a OverlapTimeline of all units together.
    """

    def __init__(self, *, timeline: bool = False) -> None:
        self._seen, self._cursor = np.zeros(8, np.uint8), np.zeros(8, np.int64)
        self._ends, self._masks = np.zeros((8, _KINDS), np.int64), np.zeros((8, 1 << _KINDS), np.int64)
        self.timeline = OverlapTimeline() if timeline else None

    def add(
        self, start: NDArray[np.int64], duration: NDArray[np.int64], unit: NDArray[np.int32], kind: NDArray[np.uint8]
    ) -> None:
        """Take spans that start no earlier than those before."""
        if not len(start):
            return

        self._reserve(int(unit.max()) + 1)
        columns = [np.ascontiguousarray(each) for each in (start, duration, unit, kind)]
        lib = library()
        if lib:
            lib.traceml_overlap(ctypes.c_int64(len(start)), *map(pointer, columns), *self._state(), self._line())
        else:
            for row in zip(*(column.tolist() for column in columns), strict=True):
                self._plain(*row)

    def finish(self) -> None:
        """Go on to the end of what is open."""
        lib = library()
        if lib:
            lib.traceml_finish_overlap(ctypes.c_int64(len(self._seen)), *self._state(), self._line())
            return

        for unit in np.flatnonzero(self._seen).tolist():
            self._pass(unit, max(int(self._cursor[unit]), int(self._ends[unit].max())))

    def units(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the number of each unit with its time (ns) by set of kinds: bit k stands for kind k, 0 for idle."""
        for unit in np.flatnonzero(self._seen).tolist():
            yield unit, self._masks[unit]

    def _reserve(self, units: int) -> None:
        self._seen, self._cursor = grown(self._seen, units), grown(self._cursor, units)
        self._ends, self._masks = grown(self._ends, units), grown(self._masks, units)

    def _state(self) -> list[ctypes.c_void_p]:
        return [pointer(each) for each in (self._seen, self._cursor, self._ends, self._masks)]

    def _line(self) -> ctypes.c_void_p | None:
        return None if self.timeline is None else pointer(self.timeline.state)

    def _plain(self, start: int, duration: int, unit: int, kind: int) -> None:
        if not self._seen[unit]:
            self._seen[unit], self._cursor[unit], self._ends[unit] = 1, start, start

        self._pass(unit, start)
        self._ends[unit, kind] = max(int(self._ends[unit, kind]), start + duration)
        if self.timeline is not None:
            self.timeline.begin(start)

    def _pass(self, unit: int, to: int) -> None:
        at = int(self._cursor[unit])
        ends = self._ends[unit].tolist()
        while at < to:
            mask = sum(1 << kind for kind, end in enumerate(ends) if end > at)
            until = min([to, *(end for end in ends if end > at)])
            self._masks[unit, mask] += until - at
            if mask and self.timeline is not None:
                self.timeline.draw(mask, at, until)

            at = until

        self._cursor[unit] = at
