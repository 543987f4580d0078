"""Memory that a task uses again and again, kept while it runs.

Dask starts workers with MALLOC_TRIM_THRESHOLD_=65536, so that memory goes back to the system at once. For columns that
come and go this means a page fault for every page of every one of them: a part of a trace took 1.6 times as long.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_memory"]

_SETTING = "MALLOC_TRIM_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 1024 * 1024
_LARGEST_BYTES = 32 * 1024 * 1024  # glibc takes no more for the second
_DEFAULT_BYTES = 128 * 1024


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let freed memory stay with the process for a while; then all of it goes back, as the environment asks for."""
    set_to = os.environ.get(_SETTING, "")
    libc = _glibc() if set_to.isdigit() else None
    if libc is None:
        yield
        return

    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, int(set_to))
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
