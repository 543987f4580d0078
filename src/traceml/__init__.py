"""Launch, trace, track and explain PyTorch training, from a laptop to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traceml.errors import (
        AgentFailedError,
        AggregatorRefusedError,
        AggregatorUnavailableError,
        BackendBusyError,
        BackendError,
        BackendRefusedError,
        BackendUnauthorizedError,
        LaunchTimeoutError,
        PayloadError,
        PluginError,
        ProtocolError,
        ResultNotFoundError,
        RunNotFoundError,
        SettingsError,
        SlurmError,
        StoreError,
        TraceMLError,
        UsageError,
        WorkerFailedError,
    )
    from traceml.recorder.api import Recorder, init, is_enabled, phase, shutdown, trace, trace_data, trace_step
    from traceml.runs.run import Run, load_run
    from traceml.settings import Settings
    from traceml.track.interfaces import BackendInterface, CollectorInterface, FrameworkInterface
    from traceml.track.metric import Metric
    from traceml.track.plugins import (
        BackendPlugin,
        CollectorPlugin,
        FrameworkPlugin,
        PluginInterface,
        PluginMetadata,
        register,
    )

__version__ = "0.1.0"

# Public name -> the module that holds it, loaded on first use: `import traceml` costs a training script nothing.
_HOMES = {
    "AgentFailedError": "traceml.errors",
    "AggregatorRefusedError": "traceml.errors",
    "AggregatorUnavailableError": "traceml.errors",
    "BackendBusyError": "traceml.errors",
    "BackendError": "traceml.errors",
    "BackendInterface": "traceml.track.interfaces",
    "BackendPlugin": "traceml.track.plugins",
    "BackendRefusedError": "traceml.errors",
    "BackendUnauthorizedError": "traceml.errors",
    "CollectorInterface": "traceml.track.interfaces",
    "CollectorPlugin": "traceml.track.plugins",
    "FrameworkInterface": "traceml.track.interfaces",
    "FrameworkPlugin": "traceml.track.plugins",
    "LaunchTimeoutError": "traceml.errors",
    "Metric": "traceml.track.metric",
    "PayloadError": "traceml.errors",
    "PluginError": "traceml.errors",
    "PluginInterface": "traceml.track.plugins",
    "PluginMetadata": "traceml.track.plugins",
    "ProtocolError": "traceml.errors",
    "Recorder": "traceml.recorder.api",
    "ResultNotFoundError": "traceml.errors",
    "Run": "traceml.runs.run",
    "RunNotFoundError": "traceml.errors",
    "Settings": "traceml.settings",
    "SettingsError": "traceml.errors",
    "SlurmError": "traceml.errors",
    "StoreError": "traceml.errors",
    "TraceMLError": "traceml.errors",
    "UsageError": "traceml.errors",
    "WorkerFailedError": "traceml.errors",
    "init": "traceml.recorder.api",
    "is_enabled": "traceml.recorder.api",
    "load_run": "traceml.runs.run",
    "phase": "traceml.recorder.api",
    "register": "traceml.track.plugins",
    "shutdown": "traceml.recorder.api",
    "trace": "traceml.recorder.api",
    "trace_data": "traceml.recorder.api",
    "trace_step": "traceml.recorder.api",
}

__all__ = [
    "AgentFailedError",
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "BackendBusyError",
    "BackendError",
    "BackendInterface",
    "BackendPlugin",
    "BackendRefusedError",
    "BackendUnauthorizedError",
    "CollectorInterface",
    "CollectorPlugin",
    "FrameworkInterface",
    "FrameworkPlugin",
    "LaunchTimeoutError",
    "Metric",
    "PayloadError",
    "PluginError",
    "PluginInterface",
    "PluginMetadata",
    "ProtocolError",
    "Recorder",
    "ResultNotFoundError",
    "Run",
    "RunNotFoundError",
    "Settings",
    "SettingsError",
    "SlurmError",
    "StoreError",
    "TraceMLError",
    "UsageError",
    "WorkerFailedError",
    "init",
    "is_enabled",
    "load_run",
    "phase",
    "register",
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
