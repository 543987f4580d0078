"""Exact sums by group, of integers and of their squares, whatever their size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.traces.native.library import grown

__all__ = ["ExactSums", "SquareSums"]

_HALF = 32
_MASK = 2**_HALF - 1


class ExactSums:
    """Sums of 64-bit integers, signed or unsigned: halves are added, which cannot overflow, and carried."""

    def __init__(self) -> None:
        self._low, self._high = np.zeros(64, np.int64), np.zeros(64, np.int64)

    def add(self, group: NDArray[np.int32], values: NDArray[np.int64] | NDArray[np.uint64], groups: int) -> None:
        """Add a value to the sum of each row's group; `groups` is the number of groups so far."""
        self._low, self._high = grown(self._low, groups), grown(self._high, groups)
        np.add.at(self._low, group, (values & values.dtype.type(_MASK)).astype(np.int64))
        np.add.at(self._high, group, (values >> values.dtype.type(_HALF)).astype(np.int64))
        self._high += self._low >> _HALF
        self._low &= _MASK

    def __getitem__(self, group: int) -> int:
        return 0 if group >= len(self._low) else (int(self._high[group]) << _HALF) + int(self._low[group])


class SquareSums:
    """Sums of squares of integers from 0 to 2^63: of (a * 2^32 + b)^2 the three products are summed."""

    def __init__(self) -> None:
        self._upper, self._mixed, self._lower = ExactSums(), ExactSums(), ExactSums()

    def add(self, group: NDArray[np.int32], values: NDArray[np.int64], groups: int) -> None:
        """Add the square of a value to the sum of each row's group; `groups` is the number of groups so far."""
        high, low = (values >> _HALF).astype(np.uint64), (values & _MASK).astype(np.uint64)
        self._upper.add(group, high * high, groups)
        self._mixed.add(group, high * low, groups)
        self._lower.add(group, low * low, groups)

    def __getitem__(self, group: int) -> int:
        return (self._upper[group] << 2 * _HALF) + (self._mixed[group] << _HALF + 1) + self._lower[group]
