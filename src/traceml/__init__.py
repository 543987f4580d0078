"""Launch, trace, track and explain PyTorch training, from a laptop to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traceml.errors import (
        AggregatorRefusedError,
        AggregatorUnavailableError,
        ProtocolError,
        RunNotFoundError,
        SettingsError,
        StoreError,
        TraceMLError,
        UsageError,
    )
    from traceml.recorder.api import Recorder, init, is_enabled, phase, shutdown, trace, trace_data, trace_step
    from traceml.runs.run import Run, load_run
    from traceml.settings import Settings

__version__ = "0.1.0"

# Public name -> the module that holds it, loaded on first use: `import traceml` costs a training script nothing.
_HOMES = {
    "AggregatorRefusedError": "traceml.errors",
    "AggregatorUnavailableError": "traceml.errors",
    "ProtocolError": "traceml.errors",
    "Recorder": "traceml.recorder.api",
    "Run": "traceml.runs.run",
    "RunNotFoundError": "traceml.errors",
    "Settings": "traceml.settings",
    "SettingsError": "traceml.errors",
    "StoreError": "traceml.errors",
    "TraceMLError": "traceml.errors",
    "UsageError": "traceml.errors",
    "init": "traceml.recorder.api",
    "is_enabled": "traceml.recorder.api",
    "load_run": "traceml.runs.run",
    "phase": "traceml.recorder.api",
    "shutdown": "traceml.recorder.api",
    "trace": "traceml.recorder.api",
    "trace_data": "traceml.recorder.api",
    "trace_step": "traceml.recorder.api",
}

__all__ = [
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "ProtocolError",
    "Recorder",
    "Run",
    "RunNotFoundError",
    "Settings",
    "SettingsError",
    "StoreError",
    "TraceMLError",
    "UsageError",
    "init",
    "is_enabled",
    "load_run",
    "phase",
    "shutdown",
    "trace",
    "trace_data",
    "trace_step",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'traceml' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
