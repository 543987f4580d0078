"""Launch, trace, track and explain PyTorch training, from a laptop to a cluster."""

from __future__ import annotations

import atexit
import sys
from types import ModuleType

TYPE_CHECKING = False  # as type checkers know it; the import of typing takes longer than all the rest
if TYPE_CHECKING:
    from typing import Any

    from traceml.display.notebook import Run, load_run
    from traceml.errors import (
        AgentFailedError,
        AggregatorRefusedError,
        AggregatorUnavailableError,
        ArgumentTypeError,
        BackendBusyError,
        BackendError,
        BackendRefusedError,
        BackendUnauthorizedError,
        FileForbiddenError,
        FileMissingError,
        FileUnreadableError,
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
        TableNotFoundError,
        TaskCancelledError,
        TaskDeadlockError,
        TaskError,
        TaskForkedError,
        TasksFailedError,
        TaskTimeoutError,
        TraceEmptyError,
        TraceInvalidError,
        TraceMLError,
        TraceNotFoundError,
        UsageError,
        WaitTimeoutError,
        WorkerFailedError,
    )
    from traceml.launch.launcher.launch_options import DEFAULT_ENV_VARS, LaunchResult
    from traceml.launch.launcher.launcher import Launcher, launch
    from traceml.launch.launcher.logs.log_handlers import add_filter_to_handler, file_handler, stream_handler
    from traceml.launch.launcher.submission.submitted_job import SubmittedJob
    from traceml.recorder.current_recorder import is_enabled
    from traceml.recorder.lifecycle import shutdown
    from traceml.recorder.recorder import Recorder
    from traceml.recorder.tracing_api import phase, set_step, trace, trace_data, trace_step
    from traceml.runs.find import RunInfo
    from traceml.runs.run import runs
    from traceml.session.run_summary import summary
    from traceml.session.startup import init
    from traceml.settings import Settings
    from traceml.tasks.handle import TaskHandle
    from traceml.tasks.runtime import Runtime, get_default_runtime, set_default_runtime
    from traceml.track.plugins.interfaces import BackendInterface, CollectorInterface, FrameworkInterface
    from traceml.track.plugins.metric import Metric
    from traceml.track.plugins.plugin_base import BackendPlugin, CollectorPlugin, FrameworkPlugin, PluginInterface
    from traceml.track.plugins.plugin_metadata import PluginMetadata
    from traceml.track.plugins.plugin_registry import register
    from traceml.track.rank.delivery_wait import flush, sync
    from traceml.track.rank.experiment import Experiment, Orchestrator
    from traceml.track.rank.log_calls import (
        get_active_experiment,
        log_artifact,
        log_histogram,
        log_image,
        log_metric,
        log_metrics,
        log_params,
        log_text,
    )
    from traceml.track.rank.start_logging import start_logging, stop_logging
    from traceml.version import __version__ as __version__

# Public names by module, except errors, imported on first use: `import traceml` costs a training script nothing.
_NAMES = {
    "traceml.display.notebook": "Run load_run",
    "traceml.launch.launcher.launch_options": "DEFAULT_ENV_VARS LaunchResult",
    "traceml.launch.launcher.launcher": "Launcher launch",
    "traceml.launch.launcher.logs.log_handlers": "add_filter_to_handler file_handler stream_handler",
    "traceml.launch.launcher.submission.submitted_job": "SubmittedJob",
    "traceml.recorder.tracing_api": "phase set_step trace trace_data trace_step",
    "traceml.recorder.current_recorder": "is_enabled",
    "traceml.recorder.lifecycle": "shutdown",
    "traceml.recorder.recorder": "Recorder",
    "traceml.runs.find": "RunInfo",
    "traceml.runs.run": "runs",
    "traceml.session.run_summary": "summary",
    "traceml.session.startup": "init",
    "traceml.settings": "Settings",
    "traceml.tasks.handle": "TaskHandle",
    "traceml.tasks.runtime": "Runtime get_default_runtime set_default_runtime",
    "traceml.track.plugins.interfaces": "BackendInterface CollectorInterface FrameworkInterface",
    "traceml.track.plugins.metric": "Metric",
    "traceml.track.plugins.plugin_base": "BackendPlugin CollectorPlugin FrameworkPlugin PluginInterface",
    "traceml.track.plugins.plugin_metadata": "PluginMetadata",
    "traceml.track.plugins.plugin_registry": "register",
    "traceml.track.rank.delivery_wait": "flush sync",
    "traceml.track.rank.experiment": "Experiment Orchestrator",
    "traceml.track.rank.log_calls": (
        "get_active_experiment log_artifact log_histogram log_image log_metric log_metrics log_params log_text"
    ),
    "traceml.track.rank.start_logging": "start_logging stop_logging",
}
_MODULES = ("dask", "integrations")  # whose names users write in full, as traceml.dask.TraceMLDaskWorkerPlugin

__all__ = [  # noqa: RUF022 - in the plain order of sorted(), which a test holds
    "AgentFailedError",
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "ArgumentTypeError",
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
    "FileForbiddenError",
    "FileMissingError",
    "FileUnreadableError",
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
    "RunInfo",
    "RunNotFoundError",
    "Runtime",
    "RuntimeClosedError",
    "Settings",
    "SettingsError",
    "SlurmError",
    "StoreError",
    "SubmittedJob",
    "TableNotFoundError",
    "TaskCancelledError",
    "TaskDeadlockError",
    "TaskError",
    "TaskForkedError",
    "TaskHandle",
    "TaskTimeoutError",
    "TasksFailedError",
    "TraceEmptyError",
    "TraceInvalidError",
    "TraceMLError",
    "TraceNotFoundError",
    "UsageError",
    "WaitTimeoutError",
    "WorkerFailedError",
    "add_filter_to_handler",
    "file_handler",
    "flush",
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
    "runs",
    "set_default_runtime",
    "set_step",
    "shutdown",
    "start_logging",
    "stop_logging",
    "stream_handler",
    "summary",
    "sync",
    "trace",
    "trace_data",
    "trace_step",
]

_HOMES = {name: "traceml.errors" for name in __all__ if name.endswith("Error")}
_HOMES |= {name: module for module, names in _NAMES.items() for name in names.split()}


# A thread may be the first to use a name, while another one forks: then the gate must be there already.
if "threading" in sys.modules:  # its import takes longer than all the rest, and without it there is one thread
    from traceml import fork_gate as fork_gate
    from traceml import gc_pause as gc_pause


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return import_module(f"traceml.{name}")

    home = "traceml.version" if name == "__version__" else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'traceml' has no attribute {name!r}")

    if sys.is_finalizing() and home not in sys.modules:  # in a __del__: nothing is imported any more, nor recorded
        return _do_nothing

    try:
        value = getattr(_imported(home), name)
    except (AttributeError, ImportError):
        if not _is_being_imported():
            raise

        return _do_nothing  # in a signal handler that has interrupted the import

    globals()[name] = value  # the next access does not call this function
    return value


def _imported(module: str) -> ModuleType:
    """Import one of our modules, without a search for garbage: behind torch's import one of all objects is due.

    No other thread forks meanwhile: its child would wait for the module forever.
    """
    from traceml.gc_pause import gc_pause

    with gc_pause:
        from traceml.fork_gate import fork_gate

        with fork_gate:
            from traceml.installation import warn_of_foreign

            warn_of_foreign()
            __import__(module)
            return sys.modules[module]


def _is_being_imported() -> bool:
    ours = (module for name, module in [*sys.modules.items()] if name.startswith("traceml."))
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)


def _do_nothing(*_arguments: Any, **_named: Any) -> None:
    """Stand in for a function that cannot be imported now."""


@atexit.register
def _end() -> None:
    """End a recorder that a function of `atexit` has started: none that is registered meanwhile is called."""
    lifecycle = sys.modules.get("traceml.recorder.lifecycle")
    if lifecycle is not None:
        lifecycle.at_exit()


def load_ipython_extension(shell: Any) -> None:
    """Add the cell magic `%%traceml`; IPython calls this for `%load_ext traceml`."""
    from traceml.session.notebook_magics import register

    register(shell)


def __dir__() -> list[str]:
    own = (name for name, value in globals().items() if name[:2] == "__" or isinstance(value, ModuleType))
    return sorted({*own, *__all__} - {"atexit", "sys"})


class _Package(ModuleType):
    """Module type that keeps `traceml.launch` the function when the folder of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return  # set by the import system after it has imported the folder

        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        from importlib import import_module

        return import_module, (self.__name__,)  # by name, because functions that refer to it are sent to workers


sys.modules[__name__].__class__ = _Package
