"""Traces: writing (`writer`), reading in columns (`reader`), and answering questions about them (`query`).

Runs in any Python program. A part is imported when one of its names is used first; it imports leaves only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traceml.traces.query.lazy import open  # noqa: A004 - `traces.open`, as in gzip
    from traceml.traces.reader.reading import read
    from traceml.traces.reader.trace_files import discover
    from traceml.traces.writer.writer import Writer

# Names that users take from here, and the modules that they live in.
_HOMES = {
    "Writer": "traceml.traces.writer.writer",
    "discover": "traceml.traces.reader.trace_files",
    "open": "traceml.traces.query.lazy",
    "read": "traceml.traces.reader.reading",
}

__all__ = ["Writer", "discover", "open", "read"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'traceml.traces' has no attribute {name!r}")

    value = globals()[name] = getattr(import_module(home), name)
    return value
