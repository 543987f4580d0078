"""Threads of numpy's OpenBLAS: none in the zygote, which must have one thread only, and each worker's share later.

`traceml analyze` has none either: they spin for a while, and the cores are needed for reading.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["one_blas_thread", "set_blas_threads"]

_VARIABLE = "OPENBLAS_NUM_THREADS"
# The setter's name in the known builds of OpenBLAS.
_SETTERS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads")

_setters: list[Callable[[int], object]] = []  # of the OpenBLAS that was loaded with one thread


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep an OpenBLAS that is loaded inside from starting its thread pool, unless the user chose the number."""
    before = os.environ.get(_VARIABLE)
    if before:  # OpenBLAS takes an empty one for none
        yield
        return

    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before

    _setters[:] = _find_setters()


def set_blas_threads(count: int) -> None:
    """Set the number of threads of an OpenBLAS that was loaded under `one_blas_thread`."""
    for setter in _setters:
        setter(count)


def _find_setters() -> list[Callable[[int], object]]:
    import ctypes

    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(None, 5)[5] for line in lines if "openblas" in line}
    found: list[Callable[[int], object]] = []
    for path in paths:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            found += [getattr(library, name) for name in _SETTERS if hasattr(library, name)][:1]

    return found
