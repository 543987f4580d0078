"""Loader of the compiled library; without it the same is computed in Python and numpy, more slowly."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["LIBRARY", "NodePool", "find", "grown", "library", "pointer"]

LIBRARY = Path(__file__).with_name("_native.so")
_VERSION = 8
_NODES = 1 << 10
_LOG = logging.getLogger("traceml")

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_RESULTS = {
    **dict.fromkeys(("traceml_find", "traceml_stats", "traceml_pairs", "traceml_nest", "traceml_match"), _I64),
    **dict.fromkeys(("traceml_overlap", "traceml_scanner_free", "traceml_copy_rows"), None),
    **dict.fromkeys(("traceml_scanner_new", "traceml_scanner_texts"), _POINTER),
}
_ARGUMENTS = {
    "traceml_find": [ctypes.c_char_p, _I64, _I64, ctypes.c_char_p, _I64],
    "traceml_scanner_new": [ctypes.c_char_p, _I64, _I32, _I32],
    "traceml_scanner_free": [_POINTER],
    "traceml_scanner_count": [_POINTER],
    "traceml_scanner_texts": [_POINTER, _I32, _POINTER],
    "traceml_copy_rows": [_POINTER, _POINTER, _POINTER, _POINTER],
    "traceml_scan": [_POINTER, _POINTER, _I64, _I64, _I32, _I32, _POINTER],
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None if it was not built, or TRACEML_NATIVE=0 forbids it."""
    if os.environ.get("TRACEML_NATIVE") == "0" or not LIBRARY.exists():
        return None

    try:
        return _declared(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError) as error:
        _LOG.warning("cannot use the native library %s: %s. Install the package again", LIBRARY, error)
        return None


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.traceml_version.restype = _I64
    if loaded.traceml_version() != _VERSION:
        raise OSError("it belongs to another version of traceml")

    for name, result in _RESULTS.items():
        getattr(loaded, name).restype = result

    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, name).argtypes = arguments

    return loaded


def find(data: bytes, sought: bytes, first: int = 0) -> int:
    """Return the position of two bytes or more from `first` on, -1 without them; other threads run meanwhile."""
    loaded = library()
    if loaded is None:
        return data.find(sought, first)

    return int(loaded.traceml_find(data, first, len(data), sought, len(sought)))


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Return the address of an array's values; the array must be contiguous and outlive the call."""
    return ctypes.c_void_p(array.ctypes.data)


def grown(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """Return `array` with at least `size` rows: itself, or a copy at least twice as long, the new rows filled."""
    if len(array) >= size:
        return array

    larger = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)  # zeros take no memory until used
    larger[: len(array)] = array
    if fill:
        larger[len(array) :] = fill

    return larger


class NodePool:
    """Nodes of stacks that the library links.

    Args:
        types: of the values that a node has.

    Attributes:
        values: a column for each.
        below: the next node of a node's stack, or of those that are free; -1 for none.
        free: the first node that is free.
    """

    def __init__(self, *types: DTypeLike) -> None:
        self.values: list[NDArray[Any]] = [np.zeros(_NODES, each) for each in types]
        self.below = np.arange(1, _NODES + 1, dtype=np.int32)
        self.below[-1] = -1
        self.free = ctypes.c_int32(0)

    def grow(self) -> None:
        """Double the pool; all existing nodes are in use."""
        size = len(self.below)
        self.values = [grown(each, size + 1) for each in self.values]
        self.below = grown(self.below, size + 1)
        self.below[size:-1] = np.arange(size + 1, len(self.below), dtype=np.int32)
        self.below[-1] = -1
        self.free.value = size

    def stack(self, node: int) -> Iterator[int]:
        """Yield a node and those below it."""
        while node >= 0:
            yield node
            node = int(self.below[node])
