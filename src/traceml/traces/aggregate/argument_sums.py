"""Sums of an argument by group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.exact_sums import ExactSums
from traceml.traces.aggregate.stats import ArgumentSum
from traceml.traces.native.library import grown

__all__ = ["ArgumentSums"]


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
