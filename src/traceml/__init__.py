"""Launch, trace, track and explain PyTorch training, from a laptop to a cluster."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traceml.display.notebook import Run, load_run
    from traceml.errors import (
        AgentFailedError,
        AggregatorRefusedError,
        AggregatorUnavailableError,
        BackendBusyError,
        BackendError,
        BackendRefusedError,
        BackendUnauthorizedError,
        LaunchTimeoutError,
        NotCallableError,
        PayloadError,
        PluginError,
        ProtocolError,
        ResultNotFoundError,
        RunNotFoundError,
        RuntimeClosedError,
        SettingsError,
        SlurmError,
        StoreError,
        TaskCancelledError,
        TaskDeadlockError,
        TaskError,
        TaskForkedError,
        TasksFailedError,
        TaskTimeoutError,
        TraceEmptyError,
        TraceMLError,
        TraceNotFoundError,
        UsageError,
        WaitTimeoutError,
        WorkerFailedError,
    )
    from traceml.launch.launcher.launch_options import DEFAULT_ENV_VARS, LaunchResult
    from traceml.launch.launcher.launcher import Launcher, launch
    from traceml.launch.launcher.log_handlers import add_filter_to_handler, file_handler, stream_handler
    from traceml.recorder.annotations import phase, trace, trace_data, trace_step
    from traceml.recorder.current import is_enabled
    from traceml.recorder.lifecycle import shutdown
    from traceml.recorder.recorder import Recorder
    from traceml.session.startup import init
    from traceml.settings import Settings
    from traceml.tasks.handle import TaskHandle
    from traceml.tasks.runtime import Runtime, get_default_runtime, set_default_runtime
    from traceml.track.plugins.interfaces import BackendInterface, CollectorInterface, FrameworkInterface
    from traceml.track.plugins.metric import Metric
    from traceml.track.plugins.plugin_base import BackendPlugin, CollectorPlugin, FrameworkPlugin, PluginInterface
    from traceml.track.plugins.plugin_metadata import PluginMetadata
    from traceml.track.plugins.plugin_registry import register
    from traceml.track.rank.experiment import (
        Experiment,
        get_active_experiment,
        log_artifact,
        log_histogram,
        log_image,
        log_metric,
        log_metrics,
        log_params,
        log_text,
        start_logging,
        stop_logging,
    )
    from traceml.track.rank.orchestrator import Orchestrator
    from traceml.version import __version__ as __version__

# Public name -> the module that holds it, loaded on first use: `import traceml` costs a training script nothing.
_HOMES = {
    "AgentFailedError": "traceml.errors",
    "AggregatorRefusedError": "traceml.errors",
    "AggregatorUnavailableError": "traceml.errors",
    "BackendBusyError": "traceml.errors",
    "BackendError": "traceml.errors",
    "BackendInterface": "traceml.track.plugins.interfaces",
    "BackendPlugin": "traceml.track.plugins.plugin_base",
    "BackendRefusedError": "traceml.errors",
    "BackendUnauthorizedError": "traceml.errors",
    "CollectorInterface": "traceml.track.plugins.interfaces",
    "CollectorPlugin": "traceml.track.plugins.plugin_base",
    "DEFAULT_ENV_VARS": "traceml.launch.launcher.launch_options",
    "Experiment": "traceml.track.rank.experiment",
    "FrameworkInterface": "traceml.track.plugins.interfaces",
    "FrameworkPlugin": "traceml.track.plugins.plugin_base",
    "LaunchResult": "traceml.launch.launcher.launch_options",
    "LaunchTimeoutError": "traceml.errors",
    "Launcher": "traceml.launch.launcher.launcher",
    "Metric": "traceml.track.plugins.metric",
    "NotCallableError": "traceml.errors",
    "Orchestrator": "traceml.track.rank.orchestrator",
    "PayloadError": "traceml.errors",
    "PluginError": "traceml.errors",
    "PluginInterface": "traceml.track.plugins.plugin_base",
    "PluginMetadata": "traceml.track.plugins.plugin_metadata",
    "ProtocolError": "traceml.errors",
    "Recorder": "traceml.recorder.recorder",
    "ResultNotFoundError": "traceml.errors",
    "Run": "traceml.display.notebook",
    "RunNotFoundError": "traceml.errors",
    "Runtime": "traceml.tasks.runtime",
    "RuntimeClosedError": "traceml.errors",
    "Settings": "traceml.settings",
    "SettingsError": "traceml.errors",
    "SlurmError": "traceml.errors",
    "StoreError": "traceml.errors",
    "TaskCancelledError": "traceml.errors",
    "TaskDeadlockError": "traceml.errors",
    "TaskError": "traceml.errors",
    "TaskForkedError": "traceml.errors",
    "TaskHandle": "traceml.tasks.handle",
    "TaskTimeoutError": "traceml.errors",
    "TasksFailedError": "traceml.errors",
    "TraceEmptyError": "traceml.errors",
    "TraceMLError": "traceml.errors",
    "TraceNotFoundError": "traceml.errors",
    "UsageError": "traceml.errors",
    "WaitTimeoutError": "traceml.errors",
    "WorkerFailedError": "traceml.errors",
    "add_filter_to_handler": "traceml.launch.launcher.log_handlers",
    "file_handler": "traceml.launch.launcher.log_handlers",
    "get_active_experiment": "traceml.track.rank.experiment",
    "get_default_runtime": "traceml.tasks.runtime",
    "init": "traceml.session.startup",
    "is_enabled": "traceml.recorder.current",
    "launch": "traceml.launch.launcher.launcher",
    "load_run": "traceml.display.notebook",
    "log_artifact": "traceml.track.rank.experiment",
    "log_histogram": "traceml.track.rank.experiment",
    "log_image": "traceml.track.rank.experiment",
    "log_metric": "traceml.track.rank.experiment",
    "log_metrics": "traceml.track.rank.experiment",
    "log_params": "traceml.track.rank.experiment",
    "log_text": "traceml.track.rank.experiment",
    "phase": "traceml.recorder.annotations",
    "register": "traceml.track.plugins.plugin_registry",
    "set_default_runtime": "traceml.tasks.runtime",
    "shutdown": "traceml.recorder.lifecycle",
    "start_logging": "traceml.track.rank.experiment",
    "stop_logging": "traceml.track.rank.experiment",
    "stream_handler": "traceml.launch.launcher.log_handlers",
    "trace": "traceml.recorder.annotations",
    "trace_data": "traceml.recorder.annotations",
    "trace_step": "traceml.recorder.annotations",
}

__all__ = [  # noqa: RUF022 - in the plain order of sorted(), which a test holds
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
    "DEFAULT_ENV_VARS",
    "Experiment",
    "FrameworkInterface",
    "FrameworkPlugin",
    "LaunchResult",
    "LaunchTimeoutError",
    "Launcher",
    "Metric",
    "NotCallableError",
    "Orchestrator",
    "PayloadError",
    "PluginError",
    "PluginInterface",
    "PluginMetadata",
    "ProtocolError",
    "Recorder",
    "ResultNotFoundError",
    "Run",
    "RunNotFoundError",
    "Runtime",
    "RuntimeClosedError",
    "Settings",
    "SettingsError",
    "SlurmError",
    "StoreError",
    "TaskCancelledError",
    "TaskDeadlockError",
    "TaskError",
    "TaskForkedError",
    "TaskHandle",
    "TaskTimeoutError",
    "TasksFailedError",
    "TraceEmptyError",
    "TraceMLError",
    "TraceNotFoundError",
    "UsageError",
    "WaitTimeoutError",
    "WorkerFailedError",
    "add_filter_to_handler",
    "file_handler",
    "get_active_experiment",
    "get_default_runtime",
    "init",
    "is_enabled",
    "launch",
    "load_run",
    "log_artifact",
    "log_histogram",
    "log_image",
    "log_metric",
    "log_metrics",
    "log_params",
    "log_text",
    "phase",
    "register",
    "set_default_runtime",
    "shutdown",
    "start_logging",
    "stop_logging",
    "stream_handler",
    "trace",
    "trace_data",
    "trace_step",
]


def __getattr__(name: str) -> Any:
    home = "traceml.version" if name == "__version__" else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'traceml' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`traceml.launch` is the function, whoever imports something from the folder of that name first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):  # the import system, after it has imported the folder
            return

        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        from importlib import import_module

        return import_module, (self.__name__,)  # as any module: functions that name it travel to workers


sys.modules[__name__].__class__ = _Package
