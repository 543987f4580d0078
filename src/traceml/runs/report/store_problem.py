"""Check of a run's store that does not open it: `traceml report` reads the report of an ended run alone.

A light module: a command of some tens of milliseconds imports it.
"""

from __future__ import annotations

import os
from pathlib import Path

from traceml.run_folder import STORE_NAME
from traceml.trusted_files import open_regular

__all__ = ["store_problem"]

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_LARGEST_PAGE = 65536  # is written as 1


def store_problem(run_dir: Path) -> str:
    """Return what is wrong with a run's store, `is missing` or `is damaged`; empty if nothing is seen."""
    try:
        with open(open_regular(run_dir / STORE_NAME), "rb") as file:
            header, size = file.read(_HEADER_BYTES), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"

    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        return "is damaged"

    page = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    # The number of pages counts only if the same change wrote it.
    is_cut = header[24:28] == header[92:96] and size < pages * (_LARGEST_PAGE if page == 1 else page)
    return "is damaged" if is_cut else ""
