"""Setting of malloc in Dask workers.

Dask starts workers with MALLOC_TRIM_THRESHOLD_=65536, so that freed memory returns to the system at once. For columns
that are allocated again and again this costs a page fault per page: a part of a trace took 1.6 times as long.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory"]

_SETTING = "MALLOC_TRIM_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 1024 * 1024
_LARGEST_BYTES = 32 * 1024 * 1024  # maximum that glibc accepts for M_MMAP_THRESHOLD
_DEFAULT_BYTES = 128 * 1024


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process; return it at the end, and restore the setting of the environment."""
    threshold = os.environ.get(_SETTING, "")
    libc = _glibc() if threshold.isdigit() else None
    if libc is None:
        yield
        return

    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, int(threshold))
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
