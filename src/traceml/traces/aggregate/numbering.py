"""Dense numbers for pairs of numbers: groups by several fields, threads of processes, classes of names."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from traceml.traces.native.library import library, pointer

__all__ = ["PairNumbering"]

_SLOTS = 1 << 10


class PairNumbering:
    """Numbers of distinct pairs: dense from 0, in the order in which pairs appear."""

    def __init__(self) -> None:
        self._keys = np.zeros(_SLOTS // 2, np.int64)
        self._table = np.full(_SLOTS, -1, np.int32)
        self._used = ctypes.c_int64(0)
        self._known: dict[int, int] = {}  # without the library
        self._ones: dict[tuple[int, int], int] = {}  # pairs requested one at a time: a call of the library is for many

    def __len__(self) -> int:
        return self._used.value

    def pairs(self, first: int = 0) -> NDArray[np.int32]:
        """Return the pairs from number `first` on, as rows of left and right."""
        keys = self._keys[first : len(self)]
        return np.stack([(keys >> 32).astype(np.int32), keys.astype(np.int32)], axis=1)

    def pair(self, number: int) -> tuple[int, int]:
        """Return one pair."""
        key = int(self._keys[number])
        right = key & 0xFFFFFFFF
        return key >> 32, right - (1 << 32) if right >> 31 else right

    def number(self, left: NDArray[np.int32] | int, right: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the number of each pair; `left` may be one number for all."""
        if isinstance(left, int):
            left = np.full(len(right), left, np.int32)

        left, right = np.ascontiguousarray(left, np.int32), np.ascontiguousarray(right, np.int32)
        return self._native(left, right) if library() else self._plain(left, right)

    def one(self, left: int, right: int) -> int:
        """Return the number of one pair."""
        known = self._ones.get((left, right))
        if known is None:
            known = self._ones[left, right] = int(self.number(left, np.array([right], np.int32))[0])

        return known

    def _native(self, left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.int32]:
        lib = library()
        assert lib is not None
        out = np.empty(len(right), np.int32)
        arrays = [pointer(array) for array in (left, right, out)]
        at, count = 0, ctypes.c_int64(len(right))
        while True:
            mask = ctypes.c_int64(len(self._table) - 1)
            table, keys = pointer(self._table), pointer(self._keys)
            at = lib.traceml_pairs(ctypes.c_int64(at), count, *arrays, table, mask, keys, ctypes.byref(self._used))
            if at == len(right):
                return out

            self._grow()

    def _grow(self) -> None:
        """Insert all pairs in a table four times as large; their numbers stay the same."""
        lib = library()
        assert lib is not None
        known = self.pairs()
        slots = 4 * len(self._table)
        self._keys, self._table = np.zeros(slots // 2, np.int64), np.full(slots, -1, np.int32)
        self._used = ctypes.c_int64(0)
        self._native(np.ascontiguousarray(known[:, 0]), np.ascontiguousarray(known[:, 1]))

    def _plain(self, left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.int32]:
        keys = (left.astype(np.int64) << 32) | (right.astype(np.int64) & 0xFFFFFFFF)
        numbers = [self._known.setdefault(key, len(self._known)) for key in keys.tolist()]
        if len(self._known) > self._used.value:
            self._keys = np.fromiter(self._known, np.int64, len(self._known))
            self._used.value = len(self._known)

        return np.array(numbers, np.int32)
