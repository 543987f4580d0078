"""Spans from begin and end events: B with E of one thread, b with e of one asynchronous id."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.numbering import PairNumbering
from traceml.traces.aggregate.sorting import ExternalSorter, RowColumns
from traceml.traces.native.library import NodePool, grown, library, pointer

__all__ = ["SpanMatcher", "Unpaired"]

_Open = tuple[int, int, int, int]  # begin, name, group, mark


@dataclass(slots=True)
class Unpaired:
    """Begins without an end, ends without a begin, and ends of a span while a later one was still open."""

    begins: int = 0
    ends: int = 0
    crossed: int = 0


class SpanMatcher:
    """Matches begin and end events in the order of time; takes them in any order.

    An end without a name closes the innermost begin of its lane, an end with a name the innermost begin of that name.
    Begins inside it stay open, so spans may end in any order. The time of an
    event does not depend on the number of open begins.

    Attributes:
        edges: the events: time, whether it is an end, lane, name, group and mark; those of a begin are its span's.
    """

    def __init__(self, edges: ExternalSorter | None = None) -> None:
        self.edges = edges or ExternalSorter()
        self._keys = PairNumbering()  # (lane, name)
        self._head, self._top = np.full(64, -1, np.int32), np.full(64, -1, np.int32)  # by lane, by key
        # time, key, group, mark, the begin above it in its lane, and the one under it that has its key
        self._nodes = NodePool(np.int64, np.int32, np.int32, np.uint8, np.int32, np.int32)
        self._open: dict[int, _OpenBegins] = {}  # by lane, without the library
        self.unpaired = Unpaired()

    def spans(self) -> Iterator[RowColumns]:
        """Yield start, duration, group, lane and mark of the spans; sets `unpaired`."""
        for rows in self.edges.blocks():
            columns = [np.ascontiguousarray(column) for column in rows]
            yield self._native(columns) if library() else self._plain(columns)

        self.unpaired.begins += self._left_open()

    def _native(self, columns: list[NDArray[Any]]) -> RowColumns:
        lib = library()
        assert lib is not None
        count = len(columns[0])
        out = [np.empty(count, kind) for kind in (np.int64, np.int64, np.int32, np.int32, np.uint8)]
        tally = np.zeros(3, np.int64)
        columns = [*columns, self._keys.number(columns[2], columns[3])]
        self._head = grown(self._head, int(columns[2].max()) + 1, -1)
        self._top = grown(self._top, len(self._keys), -1)
        fixed = [pointer(each) for each in (*columns, self._head, self._top)]
        tail = [ctypes.byref(self._nodes.free), *(pointer(each) for each in (*out, tally))]
        at = 0
        while True:
            values = [pointer(each) for each in self._nodes.values]
            open_ = [*values[:4], pointer(self._nodes.below), *values[4:]]
            at = lib.traceml_match(ctypes.c_int64(at), ctypes.c_int64(count), *fixed, *open_, *tail)
            if at == count:
                break

            self._nodes.grow()

        self.unpaired.crossed += int(tally[1])
        self.unpaired.ends += int(tally[2])
        return tuple(each[: tally[0]] for each in out)

    def _plain(self, columns: list[NDArray[Any]]) -> RowColumns:
        spans: list[tuple[int, int, int, int, int]] = []
        for ts, is_end, lane, name, group, mark in zip(*(column.tolist() for column in columns), strict=True):
            begins = self._open.setdefault(lane, _OpenBegins())
            if not is_end:
                begins.add((ts, name, group, mark))
            elif (begin := begins.close(name, self.unpaired)) is not None:
                spans.append((begin[0], ts - begin[0], begin[2], lane, begin[3]))

        kinds = (np.int64, np.int64, np.int32, np.int32, np.uint8)
        fields = zip(*spans, strict=True) if spans else ((),) * len(kinds)
        return tuple(np.array(each, kind) for each, kind in zip(fields, kinds, strict=True))

    def _left_open(self) -> int:
        left = sum(len(begins) for begins in self._open.values())
        return left + sum(1 for top in self._head.tolist() for _ in self._nodes.stack(top))


class _OpenBegins:
    """Open begins of a lane, by order and by name; without the library."""

    def __init__(self) -> None:
        self._begins: OrderedDict[int, _Open] = OrderedDict()
        self._by_name: dict[int, list[int]] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._begins)

    def add(self, begin: _Open) -> None:
        """Open a span inside all others."""
        self._begins[self._added] = begin
        self._by_name.setdefault(begin[1], []).append(self._added)
        self._added += 1

    def close(self, name: int, unpaired: Unpaired) -> _Open | None:
        """Take the innermost begin of a name, of any name if that is negative; None without one. Counts what is odd."""
        last = next(reversed(self._begins), None)
        named = self._by_name.get(name) if name >= 0 or last is None else self._by_name[self._begins[last][1]]
        if not named:
            unpaired.ends += 1
            return None

        place = named.pop()
        unpaired.crossed += place != last
        return self._begins.pop(place)
