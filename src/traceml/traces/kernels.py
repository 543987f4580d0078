"""The library of stats.c, where it was built; without it the same is computed in numpy, more slowly."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIBRARY", "grown", "library", "pointer"]

LIBRARY = Path(__file__).with_name("_stats.so")
_VERSION = 3
_LOG = logging.getLogger("traceml")


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there are none, or TRACEML_NATIVE=0 forbids them."""
    if os.environ.get("TRACEML_NATIVE") == "0" or not LIBRARY.exists():
        return None

    try:
        return _declared(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError) as error:
        _LOG.warning("cannot use %s: %s. Install the package again", LIBRARY, error)
        return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    found.traceml_version.restype = ctypes.c_int64
    if found.traceml_version() != _VERSION:
        raise OSError("it is of another version of traceml")

    for name in ("traceml_stats", "traceml_pairs", "traceml_nest", "traceml_match"):
        getattr(found, name).restype = ctypes.c_int64

    for name in ("traceml_unnest", "traceml_cover", "traceml_uncover"):
        getattr(found, name).restype = None

    return found


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Return where an array's values begin; it must be contiguous and outlive the call."""
    return ctypes.c_void_p(array.ctypes.data)


def grown(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """Return `array` with at least `size` rows: itself, or a copy twice as long or more, the new rows filled."""
    if len(array) >= size:
        return array

    larger = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)  # zeros take no memory until used
    larger[: len(array)] = array
    if fill:
        larger[len(array) :] = fill

    return larger
