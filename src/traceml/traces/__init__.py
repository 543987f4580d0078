"""Traces: written, read in columns, and answered from; what is not used is not imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names that users take from here, and the modules that they live in.
_HOMES = {
    "Writer": "traceml.traces.writer",
    "discover": "traceml.traces.files",
    "open": "traceml.traces.query",
    "read": "traceml.traces.reading",
}

__all__ = ["Writer", "discover", "open", "read"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'traceml.traces' has no attribute {name!r}")

    value = globals()[name] = getattr(import_module(home), name)
    return value
