"""Self time: each moment of a thread belongs to the span that was opened last.

For spans that nest this is a span's duration minus the spans nested in it. Where two spans overlap without nesting, the
overlap belongs to the later one, so that the self times of a thread add up to the time in which it had a span.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.native.library import NodePool, grown, library, pointer

__all__ = ["SelfTimes"]

_MAX_PARTS = 4
_FEW = 1 << 14  # spans: fewer are not worth a change of threads
_MANY = 256  # spans with the same start: from this number on, sorting them is faster than inserting each


class SelfTimes:
    """Self time by group, from spans in the order of their starts.

    With the library, threads share the lanes, and read a block of spans while the next one is made.
    """

    def __init__(self) -> None:
        parts = min(1 << len(os.sched_getaffinity(0)).bit_length() - 1, _MAX_PARTS) if library() else 1
        self._parts = [_LaneTimes(part, parts - 1) for part in range(parts)]
        self._threads: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    def add(
        self, start: NDArray[np.int64], duration: NDArray[np.int64], group: NDArray[np.int32], lane: NDArray[np.int32]
    ) -> None:
        """Add spans that start no earlier than those before; times in nanoseconds, a lane is a thread."""
        columns: list[NDArray[Any]] = [np.ascontiguousarray(each) for each in (start, duration, group, lane)]
        if (start[_MANY:] == start[:-_MANY]).any():
            order = np.lexsort((-duration, start))  # the longest first: each is nested in the one before
            columns = [column[order] for column in columns]

        self._wait()
        if len(self._parts) == 1 or len(start) < _FEW:
            for part in self._parts:
                part.add(columns)
        else:
            self._threads = self._threads or ThreadPoolExecutor(len(self._parts), "traceml-nest")
            self._running = [self._threads.submit(part.add, columns) for part in self._parts]

    def finish(self) -> None:
        """Close the open spans."""
        self._wait()
        for part in self._parts:
            part.finish()

        if self._threads is not None:
            self._threads.shutdown()

    def self_ns(self, group: int) -> int:
        """Return the self time of a group; complete after `finish`."""
        return sum(part.self_ns(group) for part in self._parts)

    def _wait(self) -> None:
        for running in self._running:
            running.result()

        self._running = []


class _LaneTimes:
    """Self time by group in some of the lanes; keeps their open spans.

    Args:
        part: the last bits of the lanes' numbers; `mask` has all such bits.
    """

    def __init__(self, part: int, mask: int) -> None:
        self._part, self._mask = ctypes.c_int32(part), ctypes.c_int32(mask)
        self._low, self._high = np.zeros(64, np.uint64), np.zeros(64, np.int64)
        self._head, self._cursor = np.full(64, -1, np.int32), np.zeros(64, np.int64)
        self._nodes = NodePool(np.int64, np.int64, np.int32)  # start, end, group
        self._open: dict[int, list[tuple[int, int, int]]] = {}  # without the library: lane -> (start, end, group)

    def add(self, columns: list[NDArray[Any]]) -> None:
        """Add spans: start, duration, group, lane."""
        _, _, group, lane = columns
        if not len(lane):
            return

        self._low, self._high = grown(self._low, int(group.max()) + 1), grown(self._high, int(group.max()) + 1)
        lanes = int(lane.max()) + 1
        self._head, self._cursor = grown(self._head, lanes, -1), grown(self._cursor, lanes)
        if library():
            self._native(columns)
        else:
            for row in zip(*(column.tolist() for column in columns), strict=True):
                self._plain(*row)

    def finish(self) -> None:
        """Close the open spans."""
        for lane in np.flatnonzero(self._head >= 0).tolist():
            self._open[lane] = self._stack_of(lane)

        for lane, stack in self._open.items():
            self._pop(lane, stack, None)

    def _stack_of(self, lane: int) -> list[tuple[int, int, int]]:
        """Return what the library has left open in a lane, the innermost span last."""
        start, end, group = self._nodes.values
        nodes = self._nodes.stack(int(self._head[lane]))
        return [(int(start[node]), int(end[node]), int(group[node])) for node in nodes][::-1]

    def self_ns(self, group: int) -> int:
        """Return the self time of a group; complete after `finish`."""
        return (int(self._high[group]) << 64) + int(self._low[group]) if group < len(self._low) else 0

    def _native(self, columns: list[NDArray[Any]]) -> None:
        lib = library()
        assert lib is not None
        at, count = 0, len(columns[0])
        given = [self._part, self._mask, *(pointer(column) for column in columns)]
        while True:
            lanes = [pointer(self._head), pointer(self._cursor)]
            nodes = [pointer(each) for each in (*self._nodes.values, self._nodes.below)]
            sums = [ctypes.byref(self._nodes.free), pointer(self._low), pointer(self._high)]
            at = lib.traceml_nest(ctypes.c_int64(at), ctypes.c_int64(count), *given, *lanes, *nodes, *sums)
            if at == count:
                return

            self._nodes.grow()

    def _plain(self, start: int, duration: int, group: int, lane: int) -> None:
        if duration <= 0:
            return

        stack = self._open.setdefault(lane, [])
        self._pop(lane, stack, start)
        if stack and start > self._cursor[lane]:
            self._account(stack[-1][2], start - int(self._cursor[lane]))

        self._cursor[lane] = start
        place = len(stack)
        while place and stack[place - 1][0] == start and stack[place - 1][1] <= start + duration:
            place -= 1

        if place < len(stack) and stack[place][:2] == (start, start + duration):
            return  # an equal span is open, inside which this one would never be innermost

        outside = place
        while outside and stack[outside - 1][1] <= start + duration:  # this one is never innermost again
            outside -= 1

        stack[outside:place] = [(start, start + duration, group)]

    def _pop(self, lane: int, stack: list[tuple[int, int, int]], until: int | None) -> None:
        while stack and (until is None or stack[-1][1] <= until):
            _, end, group = stack.pop()
            if end > self._cursor[lane]:
                self._account(group, end - int(self._cursor[lane]))
                self._cursor[lane] = end

    def _account(self, group: int, time_ns: int) -> None:
        total = self.self_ns(group) + time_ns
        self._high[group], self._low[group] = total >> 64, total & (2**64 - 1)
