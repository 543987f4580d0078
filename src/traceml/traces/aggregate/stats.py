"""Count, sum, extremes, distribution and self time per group: exact integers of any size, mergeable.

The distribution is counts in buckets, 128 per power of two, so that a percentile is known to 0.4 %. The number of a
bucket is `octave * CELLS + cell`. Durations below 128 ns have a bucket each; whole microseconds below 128 are exact,
because no two of them share a bucket. Above, rounding to whole microseconds doubles the error.
"""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.exact_sums import ExactSums
from traceml.traces.native.library import grown, library, pointer

__all__ = [
    "CELLS",
    "OCTAVES",
    "RELATIVE_ERROR",
    "ArgumentSum",
    "ArgumentSums",
    "GroupStat",
    "GroupStatTable",
    "bucket",
    "middle",
    "quantile",
]

CELLS = 128
OCTAVES = 57
RELATIVE_ERROR = 1 / CELLS
_GREATEST = 2**63 - 1
_FEW = 4  # as in kernels.c


def bucket(value: int) -> int:
    """Return the bucket of a duration in nanoseconds, of any size."""
    if value < CELLS:
        return max(value, 0)

    exponent = value.bit_length() - 1
    return (exponent - 6) * CELLS + ((value >> (exponent - 7)) & (CELLS - 1))


def middle(number: int) -> int:
    """Return the nanoseconds in the middle of a bucket."""
    octave, cell = divmod(number, CELLS)
    if octave == 0:
        return cell

    width = 1 << (octave - 1)
    return (CELLS + cell) * width + width // 2


def quantile(counts: Mapping[int, int], share: Fraction, total: int) -> int:
    """Return the nearest-rank quantile in nanoseconds, within RELATIVE_ERROR of the true one.

    Args:
        counts: number of durations by bucket.
        share: 1/2 for the median.
        total: the sum of all counts, at least 1.
    """
    wanted = max(1, -(-share.numerator * total // share.denominator))
    seen = 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= wanted:
            return middle(number)

    return middle(max(counts))


@dataclass(slots=True)
class ArgumentSum:
    """Sum of an argument over the spans of one group."""

    count: int = 0  # spans that have it, as a number
    integers: int = 0  # the sum of the integers among them
    floats: float = 0.0  # the sum of the others

    @property
    def total(self) -> int | float | None:
        """The sum: an integer if all values are; None if no span has the argument."""
        return None if not self.count else self.integers + self.floats if self.floats else self.integers

    def merge(self, other: ArgumentSum) -> None:
        """Add the sum over other spans."""
        self.count += other.count
        self.integers += other.integers
        self.floats += other.floats


@dataclass(slots=True)
class GroupStat:
    """Statistics of the spans of one group; times in nanoseconds."""

    count: int = 0
    total: int = 0  # the sum of the spans' durations
    least: int | None = None
    most: int | None = None
    self_ns: int = 0  # time during which one of them was the innermost span of their thread
    counts: dict[int, int] = field(default_factory=dict)  # spans by `bucket`
    squares: int = 0  # the sum of the squares of their durations, where it was asked for
    arguments: dict[str, ArgumentSum] = field(default_factory=dict)  # sums of arguments that were asked for, by key

    def add(self, duration: int, spans: int = 1) -> None:
        """Add one span, or several that took equally long."""
        self._take(spans, spans * duration, duration, duration, {bucket(duration): spans})
        self.squares += spans * duration * duration

    def merge(self, other: GroupStat) -> None:
        """Add the statistics of other spans of the same group."""
        self.self_ns += other.self_ns
        self.squares += other.squares
        for key, sums in other.arguments.items():
            self.arguments.setdefault(key, ArgumentSum()).merge(sums)

        if other.least is not None and other.most is not None:
            self._take(other.count, other.total, other.least, other.most, other.counts)

    def _take(self, count: int, total: int, least: int, most: int, counts: dict[int, int]) -> None:
        self.count += count
        self.total += total
        self.least = least if self.least is None or least < self.least else self.least
        self.most = most if self.most is None or most > self.most else self.most
        for number, spans in counts.items():
            self.counts[number] = self.counts.get(number, 0) + spans


class GroupStatTable:
    """Statistics of numbered groups, computed from columns."""

    def __init__(self) -> None:
        self._count = np.zeros(64, np.int64)
        self._low, self._high = np.zeros(64, np.uint64), np.zeros(64, np.int64)
        self._least, self._most = np.full(64, _GREATEST, np.int64), np.full(64, -1, np.int64)
        self._few = np.zeros((64, _FEW), np.int64)  # the durations of a group with no more than these
        self._pages = np.zeros((64, OCTAVES), np.int32)  # by octave, the index of its cells + 1
        self._cells = np.zeros((256, CELLS), np.int64)
        self._used = ctypes.c_int64(0)
        self._plain: defaultdict[int, GroupStat] = defaultdict(GroupStat)  # without the library

    def add(self, group: NDArray[np.int32], duration: NDArray[np.int64], groups: int) -> None:
        """Add spans.

        Args:
            group: the number of each span's group.
            duration: nanoseconds, not negative.
        """
        if library():
            self._reserve(groups)
            self._native(np.ascontiguousarray(group, np.int32), np.ascontiguousarray(duration, np.int64))
        else:
            rows = Counter(zip(group.tolist(), duration.tolist(), strict=True))
            for (number, time_ns), spans in rows.items():
                self._plain[number].add(time_ns, spans)

    def stat(self, group: int) -> GroupStat:
        """Return the statistics of one group, without its self time."""
        if group in self._plain:
            return replace(self._plain[group], counts=self._plain[group].counts.copy())

        if group >= len(self._count) or not self._count[group]:
            return GroupStat()

        total = (int(self._high[group]) << 64) + int(self._low[group])
        counts = self._histogram(group)
        return GroupStat(int(self._count[group]), total, int(self._least[group]), int(self._most[group]), 0, counts)

    def _histogram(self, group: int) -> dict[int, int]:
        if self._count[group] <= _FEW:
            return dict(Counter(map(bucket, self._few[group, : self._count[group]].tolist())))

        counts: dict[int, int] = {}
        for octave in np.flatnonzero(self._pages[group]):
            cells = self._cells[self._pages[group, octave] - 1]
            counts |= {int(octave) * CELLS + int(cell): int(cells[cell]) for cell in np.flatnonzero(cells)}

        return counts

    def _reserve(self, groups: int) -> None:
        self._count, self._low, self._high = (grown(each, groups) for each in (self._count, self._low, self._high))
        self._least, self._most = grown(self._least, groups, _GREATEST), grown(self._most, groups, -1)
        self._few, self._pages = grown(self._few, groups), grown(self._pages, groups)

    def _native(self, group: NDArray[np.int32], duration: NDArray[np.int64]) -> None:
        lib = library()
        assert lib is not None
        fixed = [pointer(each) for each in (group, duration, self._count, self._low, self._high)]
        fixed += [pointer(each) for each in (self._least, self._most, self._few, self._pages)]
        at, size = 0, ctypes.c_int64(len(group))
        while True:
            room = ctypes.c_int64(len(self._cells))
            cells, used = pointer(self._cells), ctypes.byref(self._used)
            at = lib.traceml_stats(ctypes.c_int64(at), size, *fixed, cells, used, room)
            if at == len(group):
                return

            self._cells = grown(self._cells, len(self._cells) + 1)


class ArgumentSums:
    """Sums of one key of `args`: exact for integers."""

    def __init__(self) -> None:
        self._count, self._floats = np.zeros(64, np.int64), np.zeros(64, np.float64)
        self._integers = ExactSums()

    def add_integers(self, group: NDArray[np.int32], values: NDArray[np.int64], groups: int) -> None:
        """Add a value to the sum of each row's group; `groups` is the number of groups so far."""
        self._reserve(groups)
        np.add.at(self._count, group, 1)
        self._integers.add(group, values, groups)

    def add_floats(self, group: NDArray[np.int32], values: NDArray[np.float64], groups: int) -> None:
        """Add a value to the sum of each row's group; `groups` is the number of groups so far."""
        self._reserve(groups)
        np.add.at(self._count, group, 1)
        np.add.at(self._floats, group, values)

    def of(self, group: int) -> ArgumentSum:
        """Return the sum of a group."""
        if group >= len(self._count):
            return ArgumentSum()

        return ArgumentSum(int(self._count[group]), self._integers[group], float(self._floats[group]))

    def _reserve(self, groups: int) -> None:
        self._count, self._floats = grown(self._count, groups), grown(self._floats, groups)
